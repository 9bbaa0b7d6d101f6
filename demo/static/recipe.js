/* Recipes in and out: a JSON file, or a PNG snapshot that carries the same JSON in a text chunk. */

const KEYWORD = "streamdiff-recipe";
const PNG_SIGNATURE_BYTES = 8;

export function download(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

export function downloadRecipe(recipe) {
  download(new Blob([JSON.stringify(recipe, null, 1)], { type: "application/json" }), `streamdiff-${stamp()}.json`);
}

/** Save the canvas as PNG with the recipe inside. */
export async function downloadSnapshot(canvas, recipe) {
  const png = await new Promise((done) => canvas.toBlob(done, "image/png"));
  const withRecipe = recipe ? await addText(png, JSON.stringify(recipe)) : png;
  download(withRecipe, `streamdiff-${stamp()}.png`);
}

/** The recipe in a dropped .json or .png file; throws when there is none. */
export async function readRecipe(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  const text = file.name.toLowerCase().endsWith(".png") ? findText(bytes) : new TextDecoder().decode(bytes);
  const recipe = JSON.parse(text);
  if (!recipe || typeof recipe !== "object" || !("options" in recipe)) throw new Error("no recipe");
  return recipe;
}

/** Show the links of a finished recording: {mp4, zip, recipe}, relative to the page. */
export function offerDownloads(root, base, links) {
  for (const [name, path] of Object.entries(links)) {
    const link = root.querySelector(`#sd-download-${name}`);
    link.hidden = !path;
    if (path) link.href = new URL(path, base).href;
  }
  root.querySelector("#sd-downloads").hidden = false;
}

function stamp() {
  return new Date().toISOString().slice(0, 19).replaceAll(":", "-");
}

/** PNG chunk: length, type, data, CRC of type and data. An iTXt chunk holds UTF-8; it goes before the end chunk. */
async function addText(png, text) {
  const bytes = new Uint8Array(await png.arrayBuffer());
  const data = new TextEncoder().encode(`iTXt${KEYWORD}\0\0\0\0\0${text}`);
  const chunk = new Uint8Array(8 + data.length);
  const view = new DataView(chunk.buffer);
  view.setUint32(0, data.length - 4);
  chunk.set(data, 4);
  view.setUint32(4 + data.length, crc32(data));
  const end = bytes.length - 12;
  return new Blob([bytes.subarray(0, end), chunk, bytes.subarray(end)], { type: "image/png" });
}

function findText(bytes) {
  const view = new DataView(bytes.buffer);
  const decoder = new TextDecoder();
  for (let at = PNG_SIGNATURE_BYTES; at + 12 <= bytes.length; at += 12 + view.getUint32(at)) {
    const text = decoder.decode(bytes.subarray(at + 4, at + 8 + view.getUint32(at)));
    if (text.startsWith(`iTXt${KEYWORD}\0`)) return text.slice(4 + KEYWORD.length + 5);
  }
  throw new Error("no recipe");
}

function crc32(bytes) {
  let crc = ~0;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit += 1) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return ~crc >>> 0;
}

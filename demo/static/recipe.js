/* Recipes in and out: a JSON file, a PNG snapshot that carries the same JSON in a text chunk, or a recording's zip. */

const KEYWORD = "streamdiff-recipe";
const PNG_SIGNATURE_BYTES = 8;
const MAX_RECIPE_BYTES = 1e6;
const ZIP_END_BYTES = 22; // without a comment

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

export const mayHoldRecipe = ({ name }) => /\.(json|png|zip)$/i.test(name);

/** The recipe in a dropped .json, .png or .zip file; throws when there is none. */
export async function readRecipe(file) {
  const read = { png: findText, zip: findInZip }[file.name.toLowerCase().split(".").pop()];
  if (!read && file.size > MAX_RECIPE_BYTES) throw new Error("no recipe");
  const text = read ? await read(file) : await file.text();
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

async function findText(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  const view = new DataView(bytes.buffer);
  const decoder = new TextDecoder();
  for (let at = PNG_SIGNATURE_BYTES; at + 12 <= bytes.length; at += 12 + view.getUint32(at)) {
    const text = decoder.decode(bytes.subarray(at + 4, at + 8 + view.getUint32(at)));
    if (text.startsWith(`iTXt${KEYWORD}\0`)) return text.slice(4 + KEYWORD.length + 5);
  }
  throw new Error("no recipe");
}

/** The recipe of a recording. Its zip stores files as they are; the directory at its end says where they begin. */
async function findInZip(file) {
  const part = async (from, to) => new DataView(await file.slice(from, to).arrayBuffer());
  const text = (view, at, length) => new TextDecoder().decode(new Uint8Array(view.buffer, at, length));
  const tail = await part(Math.max(0, file.size - ZIP_END_BYTES));
  const end = tail.byteLength - ZIP_END_BYTES;
  if (end < 0 || tail.getUint32(end, true) !== 0x06054b50) throw new Error("no recipe");
  const start = tail.getUint32(end + 16, true);
  const directory = await part(start, start + tail.getUint32(end + 12, true));
  for (let at = 0; at + 46 <= directory.byteLength; ) {
    const [nameBytes, extra, comment] = [28, 30, 32].map((offset) => directory.getUint16(at + offset, true));
    const [isStored, size] = [directory.getUint16(at + 10, true) === 0, directory.getUint32(at + 24, true)];
    if (text(directory, at + 46, nameBytes) === "recipe.json" && isStored && size <= MAX_RECIPE_BYTES) {
      const local = directory.getUint32(at + 42, true);
      const header = await part(local, local + 30);
      const data = local + 30 + header.getUint16(26, true) + header.getUint16(28, true);
      return file.slice(data, data + size).text();
    }
    at += 46 + nameBytes + extra + comment;
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

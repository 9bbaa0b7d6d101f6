/* Pixels off the page's thread: crop, scale, mirror and JPEG-encode frames for the stream; decode the replies.
   in  {type: "encode", seq, bitmap, width, height, mirror}   out {type: "encoded", seq, bytes, picture}
   in  {type: "decode", header, jpegs, received, stream}      out {type: "decoded", header, pictures, ...} */

const JPEG_QUALITY = 0.85;
const canvas = new OffscreenCanvas(256, 256);
const context = canvas.getContext("2d", { alpha: false });
context.imageSmoothingQuality = "high";
let turn = Promise.resolve(); // one job after the other, so that frames keep their order

onmessage = ({ data }) => {
  const job = data.type === "encode" ? encode : decode;
  turn = turn.then(() => job(data)).catch((error) => postMessage({ type: "failed", message: String(error) }));
};

async function encode({ seq, bitmap, width, height, mirror }) {
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const { scale, x, y } = cover(bitmap, width, height);
  context.setTransform(mirror ? -scale : scale, 0, 0, scale, mirror ? width - x : x, y);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const jpeg = await canvas.convertToBlob({ type: "image/jpeg", quality: JPEG_QUALITY });
  const picture = await createImageBitmap(canvas);
  const bytes = new Uint8Array(4 + jpeg.size);
  new DataView(bytes.buffer).setUint32(0, seq, true);
  bytes.set(new Uint8Array(await jpeg.arrayBuffer()), 4);
  postMessage({ type: "encoded", seq, bytes: bytes.buffer, picture }, [bytes.buffer, picture]);
}

/** Scale and offset with which a picture fills width x height, centred. */
function cover(picture, width, height) {
  const scale = Math.max(width / picture.width, height / picture.height);
  return { scale, x: (width - picture.width * scale) / 2, y: (height - picture.height * scale) / 2 };
}

async function decode({ header, jpegs, received, stream }) {
  let offset = 0;
  const blobs = header.frames.map(([, length]) => {
    const blob = new Blob([new Uint8Array(jpegs, offset, length)], { type: "image/jpeg" });
    offset += length;
    return blob;
  });
  const pictures = await Promise.all(blobs.map((blob) => createImageBitmap(blob)));
  postMessage({ type: "decoded", header, pictures, received, stream }, pictures);
}

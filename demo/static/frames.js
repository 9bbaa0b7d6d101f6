/* The way of a frame: captured from the video, encoded in the worker, sent; and of a reply: decoded there, played. */

export class Frames {
  constructor(socket, player, stage) {
    Object.assign(this, { socket, player, stage, seq: 0, captured: 0, skipped: 0, isGrabbing: false });
    this.worker = new Worker(new URL("worker.js", import.meta.url));
    this.worker.onmessage = ({ data }) => this.#done(data);
  }

  /** Send the video's current frame, unless too many are on their way: then it is skipped, never queued. */
  async capture(video, now, mirror) {
    const { socket, player } = this;
    this.captured += 1;
    this.stage.drawLive(video, mirror, player.drawn > 0);
    if (!socket.ready) return;
    if (this.isGrabbing || !socket.canSend) {
      this.skipped += 1;
      return;
    }
    this.isGrabbing = true; // one at a time: frames keep their order
    const bitmap = await createImageBitmap(video).catch(() => null);
    this.isGrabbing = false;
    if (!bitmap || !socket.ready) return;
    const seq = this.seq++;
    const [width, height] = socket.ready.size;
    socket.sent(seq);
    player.captured(seq, now);
    this.worker.postMessage({ type: "encode", seq, bitmap, width, height, mirror }, [bitmap]);
  }

  /** Decode a chunk's pictures and play them. */
  decode(header, jpegs, received) {
    const stream = this.socket.reconnects;
    this.worker.postMessage({ type: "decode", header, jpegs, received, stream }, [jpegs]);
  }

  #done(data) {
    if (data.type === "encoded") {
      this.socket.sendFrame(data.bytes);
      this.player.input(data.seq, data.picture);
    } else if (data.type === "decoded" && data.stream === this.socket.reconnects) {
      this.player.push(data.header, data.pictures, data.received);
    } else if (data.type === "failed") {
      console.error("worker:", data.message);
    }
  }
}

/* The one WebSocket of this page: start message, frames out, chunks and messages in, flow control, reconnection.
   At most `max_unacked` frames are on their way; beyond that `canSend` is false and the caller skips the frame. */

const BACKOFF_S = [0.5, 1, 2, 4, 8];
const SILENCE_MS = 15000; // a server that says nothing for this long, stats included, is gone

export class Socket {
  /** @param on  {opened, ready, chunk, message, lost}: what to call; `opened` returns the start message. */
  constructor(url, on) {
    Object.assign(this, { url, on, ready: null, inFlight: [], attempts: 0, reconnects: -1, closed: false });
    setInterval(() => this.#watch(), 2000);
  }

  connect() {
    clearTimeout(this.timer);
    this.closed = false;
    this.#detach();
    const socket = (this.socket = new WebSocket(this.url));
    socket.binaryType = "arraybuffer";
    this.heard = performance.now();
    socket.onopen = () => socket.send(JSON.stringify(this.on.opened()));
    socket.onmessage = ({ data }) => {
      this.heard = performance.now();
      if (typeof data === "string") this.#message(JSON.parse(data));
      else this.#chunk(data);
    };
    socket.onclose = () => this.#lost();
  }

  /** Stop, and stay stopped until `connect`. */
  close() {
    this.closed = true;
    clearTimeout(this.timer);
    this.#detach();
  }

  get unacked() {
    return this.inFlight.length;
  }

  get canSend() {
    return Boolean(this.ready) && this.unacked < this.ready.max_unacked;
  }

  /** Count a frame as on its way from its capture on, so that slow encoding cannot overrun the limit. */
  sent(seq) {
    this.inFlight.push(seq);
  }

  sendFrame(bytes) {
    if (this.ready && this.socket.readyState === WebSocket.OPEN) this.socket.send(bytes);
  }

  send(message) {
    if (!this.ready) return false;
    this.socket.send(JSON.stringify(message));
    return true;
  }

  #message(message) {
    if (message.type === "ready") {
      this.ready = message;
      this.inFlight = [];
      this.attempts = 0;
      this.reconnects += 1;
      this.on.ready(message);
    } else if (message.type === "ack") {
      this.#ack(message.seq);
    } else {
      if (message.type === "error" && message.fatal) {
        this.closed = true;
        this.ready = null; // the stream has ended: nothing more goes there
        this.inFlight = [];
      }
      this.on.message(message);
    }
  }

  #chunk(data) {
    const received = performance.now();
    const length = new DataView(data).getUint32(0, true);
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
    this.#ack(header.ack);
    this.on.chunk(header, data.slice(4 + length), received);
  }

  #ack(seq) {
    this.inFlight = this.inFlight.filter((sent) => sent > seq);
  }

  #lost() {
    this.ready = null;
    this.inFlight = [];
    if (this.closed) return;
    const wait_s = BACKOFF_S[Math.min(this.attempts, BACKOFF_S.length - 1)];
    this.attempts += 1;
    this.timer = setTimeout(() => this.connect(), wait_s * 1000 * (0.8 + 0.4 * Math.random()));
    this.on.lost(wait_s, this.attempts);
  }

  #watch() {
    const open = this.socket?.readyState === WebSocket.OPEN;
    if (open && performance.now() - this.heard > SILENCE_MS) {
      this.#detach();
      this.#lost();
    }
  }

  #detach() {
    if (!this.socket) return;
    this.socket.onclose = this.socket.onmessage = null;
    this.socket.close();
    this.ready = null;
  }
}

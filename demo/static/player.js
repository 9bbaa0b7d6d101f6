/* Plays restyled frames evenly and measures what a viewer sees.
   A chunk brings n frames at once; they are shown one by one at the average interval of the last chunks, a little
   faster while more than one chunk waits. More than three chunks never wait: the oldest frames are dropped. */

const CATCH_UP = 0.9;
const MAX_CHUNKS_WAITING = 3;
const CHUNKS_AVERAGED = 8;
const LAG_WINDOW_MS = 10000;
const FPS_WINDOW_MS = 3000;
const MAX_INPUTS = 240;
const MAX_INTERVAL_MS = 1000;

export class Player {
  /** @param draw  called with ({output, input, seq, ...}) when a frame is due */
  constructor(draw) {
    this.draw = draw;
    this.skipped = 0;
    this.reset();
    const step = (now) => (this.#step(now), requestAnimationFrame(step));
    requestAnimationFrame(step);
  }

  /** A new stream: nothing of the old one is shown or counted again. */
  reset() {
    for (const frame of this.queue ?? []) frame.output.close();
    for (const input of this.inputs?.values() ?? []) input.picture?.close();
    Object.assign(this, { queue: [], inputs: new Map(), chunks: [], lags: [], drawnAt: [], due: 0 });
    Object.assign(this, { firstCaptured: null, ttff_ms: null, drawn: 0, lastFrame: null });
  }

  /** Remember when frame `seq` was captured. */
  captured(seq, captured_ms) {
    this.firstCaptured ??= captured_ms;
    this.inputs.set(seq, { captured_ms, picture: null });
    if (this.inputs.size > MAX_INPUTS) this.#forget(seq - MAX_INPUTS);
  }

  /** The picture that was sent as frame `seq`, to be shown beside its result. */
  input(seq, picture) {
    const input = this.inputs.get(seq);
    if (input) input.picture = picture;
    else picture.close();
  }

  /** Frames of one chunk, decoded. */
  push(header, pictures, received_ms) {
    this.chunks.push({ received_ms, frames: pictures.length });
    if (this.chunks.length > CHUNKS_AVERAGED) this.chunks.shift();
    header.frames.forEach(([seq], i) =>
      this.queue.push({ seq, output: pictures[i], chunk: header.chunk, prompt_id: header.prompt_id }),
    );
    while (this.queue.length > MAX_CHUNKS_WAITING * Math.max(pictures.length, 4)) {
      this.queue.shift().output.close();
      this.skipped += 1;
    }
  }

  /** Average milliseconds between frames over the last chunks; 0 until two chunks have come. */
  get interval_ms() {
    const [first] = this.chunks;
    const last = this.chunks.at(-1);
    const frames = this.chunks.slice(1).reduce((sum, chunk) => sum + chunk.frames, 0);
    return frames ? Math.min((last.received_ms - first.received_ms) / frames, MAX_INTERVAL_MS) : 0;
  }

  get fps() {
    const since = performance.now() - FPS_WINDOW_MS;
    this.drawnAt = this.drawnAt.filter((at) => at > since);
    if (this.drawnAt.length < 2) return 0;
    return ((this.drawnAt.length - 1) * 1000) / (performance.now() - this.drawnAt[0]);
  }

  /** Percentile of capture-to-drawn over the last ten seconds, null without frames. */
  lag(percent) {
    const since = performance.now() - LAG_WINDOW_MS;
    this.lags = this.lags.filter(({ at }) => at > since);
    const sorted = this.lags.map(({ lag }) => lag).sort((a, b) => a - b);
    return sorted.length ? sorted[Math.min(sorted.length - 1, Math.floor((percent / 100) * sorted.length))] : null;
  }

  #step(now) {
    if (!this.queue.length || now < this.due - 4) return;
    const waiting = this.queue.length > (this.chunks.at(-1)?.frames ?? 1);
    const interval = this.interval_ms * (waiting ? CATCH_UP : 1);
    this.due = Math.max(this.due, now - interval) + interval;
    this.#show(this.queue.shift());
  }

  #show(frame) {
    const input = this.inputs.get(frame.seq);
    const drawn_ms = performance.now();
    const captured_ms = input?.captured_ms ?? null;
    this.lastFrame = { seq: frame.seq, captured_ms, drawn_ms, chunk: frame.chunk, prompt_id: frame.prompt_id };
    this.drawn += 1;
    this.drawnAt.push(drawn_ms);
    if (input) {
      this.lags.push({ at: drawn_ms, lag: drawn_ms - captured_ms });
      this.ttff_ms ??= drawn_ms - this.firstCaptured;
    }
    this.draw({ ...frame, input: input?.picture ?? null });
    frame.output.close();
    this.#forget(frame.seq);
  }

  #forget(upTo) {
    for (const [seq, input] of this.inputs) {
      if (seq > upTo) break;
      input.picture?.close();
      this.inputs.delete(seq);
    }
  }
}

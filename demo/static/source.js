/* Where frames come from: sample clip, camera, local file or screen, all through one <video>.
   `onFrame(video, now)` is called for each frame that the rate limit lets through; failures throw a `SourceError`. */

const MAX_FILE_BYTES = 200e6;
const MAX_FILE_S = 600;
const CAMERA_FAILURES = {
  NotAllowedError: "camera_denied",
  SecurityError: "camera_denied",
  NotFoundError: "no_camera",
  OverconstrainedError: "no_camera",
};

/** `code` names the failure; messages.js has its sentence and its action. */
export class SourceError extends Error {
  constructor(code) {
    super(code);
    this.code = code;
  }
}

export class Source {
  constructor(video, sampleUrl, onFrame, onEnded) {
    Object.assign(this, { video, sampleUrl, onFrame, onEnded, kind: "sample", maxFps: 30, mirrorCamera: true, due: 0 });
    this.turn = 0; // one more with each source that begins
    this.paused = false;
    this.#next();
  }

  get mirror() {
    return this.kind === "camera" && this.mirrorCamera;
  }

  async sample() {
    this.#release("sample");
    await this.#play({ src: this.sampleUrl, loop: true }, "no_sample");
  }

  async camera(deviceId) {
    if (!navigator.mediaDevices?.getUserMedia) throw new SourceError("insecure");
    const size = { width: { ideal: 640 }, height: { ideal: 480 }, frameRate: { ideal: 30 } };
    const video = deviceId ? { ...size, deviceId: { exact: deviceId } } : size;
    const asking = navigator.mediaDevices.getUserMedia({ video, audio: false });
    await this.#live("camera", asking, "camera_gone", (error) => CAMERA_FAILURES[error.name] ?? "camera_busy");
  }

  /** [{id, name}] of cameras; names are known only after the first permission. */
  async cameras() {
    const devices = (await navigator.mediaDevices?.enumerateDevices?.()) ?? [];
    const cameras = devices.filter((device) => device.kind === "videoinput");
    return cameras.map((device, i) => ({ id: device.deviceId, name: device.label || `Camera ${i + 1}` }));
  }

  get cameraId() {
    return this.video.srcObject?.getVideoTracks()[0]?.getSettings().deviceId;
  }

  async screen() {
    if (!navigator.mediaDevices?.getDisplayMedia) throw new SourceError("no_screen");
    const asking = navigator.mediaDevices.getDisplayMedia({ video: { frameRate: 30 } });
    await this.#live("screen", asking, "screen_ended", () => "screen_denied");
  }

  /** Play a file here in the browser; only its scaled frames are sent. */
  async file(file) {
    if (file.type && !file.type.startsWith("video/")) throw new SourceError("not_a_video");
    if (file.size > MAX_FILE_BYTES) throw new SourceError("file_too_large");
    const playing = this.turn;
    const src = URL.createObjectURL(file);
    const failure = await failureOf(src);
    if (failure || this.turn !== playing) {
      URL.revokeObjectURL(src);
      if (failure) throw new SourceError(failure);
      return; // another source was chosen meanwhile
    }
    this.#release("file");
    this.objectUrl = src;
    await this.#play({ src, loop: true }, "file_unreadable");
  }

  pause(paused) {
    this.paused = paused;
    if (paused) this.video.pause();
    else this.video.play().catch(() => {});
  }

  /** A stream that the viewer is being asked for; if another source is chosen meanwhile, that one stays. */
  async #live(kind, asking, endedCode, failureCode) {
    const playing = this.turn;
    const [stream, error] = await asking.then((stream) => [stream], (error) => [null, error]);
    if (this.turn !== playing) return stream?.getTracks().forEach((track) => track.stop());
    if (error) throw new SourceError(failureCode(error));
    this.#release(kind);
    stream.getVideoTracks()[0].onended = () => this.onEnded(endedCode);
    await this.#play({ srcObject: stream, loop: false }, "camera_busy");
  }

  async #play(properties, failureCode) {
    Object.assign(this.video, properties);
    this.paused = false;
    try {
      await this.video.play();
    } catch (error) {
      if (error.name !== "AbortError") throw new SourceError(failureCode); // AbortError: another source was chosen
    }
  }

  #release(kind) {
    this.turn += 1;
    this.video.srcObject?.getTracks().forEach((track) => ((track.onended = null), track.stop()));
    this.video.srcObject = null;
    this.video.removeAttribute("src");
    if (this.objectUrl) URL.revokeObjectURL(this.objectUrl);
    this.objectUrl = null;
    this.kind = kind;
  }

  #next() {
    if (this.video.requestVideoFrameCallback) this.video.requestVideoFrameCallback(this.#tick);
    else requestAnimationFrame(this.#tick);
  }

  #tick = (now) => {
    this.#next();
    const interval = 1000 / this.maxFps;
    if (this.paused || this.video.readyState < 2 || now < this.due - interval / 4) return;
    this.due = Math.max(this.due, now - interval) + interval;
    this.onFrame(this.video, now);
  };
}

/** Why a file cannot be a source, before the source that plays now is let go; undefined: it can. */
function failureOf(src) {
  const probe = Object.assign(document.createElement("video"), { preload: "metadata", muted: true });
  return new Promise((done) => {
    probe.onerror = () => done("file_unreadable");
    probe.onloadedmetadata = () => {
      const isLong = Number.isFinite(probe.duration) && probe.duration > MAX_FILE_S; // a browser's own WebM has no end
      done(probe.videoWidth ? (isLong ? "file_too_long" : undefined) : "not_a_video");
    };
    probe.src = src;
  });
}

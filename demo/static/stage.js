/* The stage: draws input and result, view modes, split, picture-in-picture, fullscreen, dropping files, keys.
   It knows nothing of the stream; `actions` are called when the viewer asks for something. */

const GLOW_EVERY_MS = 250;
const SPLIT_KEY = "sd-split";
const VIEW_KEY = "sd-view";

export class Stage {
  constructor(root, actions) {
    Object.assign(this, { root, actions, glowAt: 0 });
    const find = (id) => root.querySelector(`#sd-${id}`);
    Object.assign(this, { stage: find("stage"), output: find("output"), pip: find("pip"), wait: find("wait") });
    Object.assign(this, { input: find("input"), glow: find("glow"), split: find("split"), tag: find("style-tag") });
    for (const name of ["input", "output", "pip", "glow"]) {
      this[`${name}2d`] = this[name].getContext("2d", { alpha: false, willReadFrequently: false });
      this[`${name}2d`].imageSmoothingQuality = "high";
    }
    this.#views();
    this.#buttons(find);
    this.#drops();
    document.addEventListener("keydown", (event) => this.#key(event));
  }

  /** A stream is ready; until its first picture comes the stage says so. */
  begin([width, height]) {
    this.waitFor(this.stage.classList.contains("has-output") ? "" : "Starting the model …");
    for (const canvas of [this.input, this.output]) {
      if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    }
    this.stage.style.setProperty("--aspect", width / height);
  }

  /** A restyled frame, and the input frame it was made of. */
  draw({ output, input }) {
    this.output2d.drawImage(output, 0, 0, this.output.width, this.output.height);
    if (input) this.input2d.drawImage(input, 0, 0, this.input.width, this.input.height);
    this.stage.classList.add("has-output");
    this.wait.hidden = true;
    const now = performance.now();
    if (now - this.glowAt > GLOW_EVERY_MS) {
      this.glowAt = now;
      this.glow2d.drawImage(output, 0, 0, this.glow.width, this.glow.height);
    }
  }

  /** The live input: in the corner always, in the input picture as long as there is no result to compare with. */
  drawLive(video, mirror, hasOutput) {
    if (!this.pip.hidden) cover(this.pip2d, video, mirror);
    if (!hasOutput) cover(this.input2d, video, mirror);
  }

  waitFor(text) {
    this.wait.textContent = text;
    this.wait.hidden = !text;
  }

  setView(view) {
    this.stage.dataset.view = view;
    press(this.root.querySelectorAll("[data-view][aria-pressed]"), "view", view);
    sessionStorage.setItem(VIEW_KEY, view);
  }

  showSource(kind) {
    press(this.root.querySelectorAll("[data-source]"), "source", kind);
    this.root.querySelector("#sd-camera").hidden = kind !== "camera";
  }

  /** [{id, name}] of cameras, and which one is on. */
  listCameras(cameras, chosen) {
    const options = cameras.map(({ id, name }) => new Option(name, id, false, id === chosen));
    this.root.querySelector("#sd-device").replaceChildren(...options);
  }

  /** {seconds} of a recording that runs, null without one. */
  showRecording(recording) {
    this.toggle("record", Boolean(recording), recording ? "Stop" : "Record");
    const note = this.root.querySelector("#sd-recording");
    note.hidden = !recording;
    note.textContent = recording ? `recording ${Math.floor(recording.seconds)} s` : "";
  }

  toggle(id, pressed, label) {
    const button = this.root.querySelector(`#sd-${id}`);
    button.setAttribute("aria-pressed", String(pressed));
    if (label) button.querySelector("span").textContent = label;
  }

  fullscreen() {
    if (document.fullscreenElement) document.exitFullscreen();
    else if (this.stage.requestFullscreen) this.stage.requestFullscreen().catch(() => this.#fill());
    else this.#fill();
  }

  /** Copy of what the viewer sees: the result, or input and result beside each other. */
  picture() {
    const shown = this.stage.dataset.view === "output" ? [this.output] : [this.input, this.output];
    const copy = document.createElement("canvas");
    Object.assign(copy, { width: shown.length * this.output.width, height: this.output.height });
    const context = copy.getContext("2d");
    shown.forEach((canvas, i) => context.drawImage(canvas, i * this.output.width, 0));
    return copy;
  }

  /** Where fullscreen does not exist (telephones): cover the page instead. */
  #fill() {
    this.stage.classList.toggle("is-filling");
  }

  #views() {
    const setSplit = () => this.stage.style.setProperty("--split", `${this.split.value}%`);
    this.split.value = sessionStorage.getItem(SPLIT_KEY) ?? this.split.value;
    this.split.oninput = () => (setSplit(), sessionStorage.setItem(SPLIT_KEY, this.split.value));
    setSplit();
    for (const button of this.root.querySelectorAll("[data-view][aria-pressed]")) {
      button.onclick = () => this.setView(button.dataset.view);
    }
    this.setView(sessionStorage.getItem(VIEW_KEY) ?? "slider");
  }

  #buttons(find) {
    const { actions } = this;
    for (const name of ["pause", "record", "snapshot", "recipe"]) find(name).onclick = () => actions[name]();
    find("fullscreen").onclick = () => this.fullscreen();
    find("unfill").onclick = () => this.#fill();
    find("pip-toggle").onclick = () => {
      this.pip.hidden = !this.pip.hidden;
      this.toggle("pip-toggle", !this.pip.hidden);
    };
    for (const button of this.root.querySelectorAll("[data-source]")) {
      button.onclick = () => actions[button.dataset.source === "file" ? "choose_file" : button.dataset.source]();
    }
    const screen = this.root.querySelector("[data-source=screen]");
    screen.hidden = !navigator.mediaDevices?.getDisplayMedia && isTouch();
    find("file").onchange = (event) => {
      const [file] = event.target.files;
      event.target.value = "";
      if (file) actions.open(file);
    };
    find("device").onchange = (event) => actions.camera(event.target.value);
    find("mirror").onchange = (event) => actions.mirror(event.target.checked);
  }

  #drops() {
    const over = (isOver) => (event) => {
      event.preventDefault();
      this.stage.classList.toggle("is-over", isOver);
    };
    this.root.addEventListener("dragover", over(true));
    this.root.addEventListener("dragleave", over(false));
    this.root.addEventListener("drop", (event) => {
      over(false)(event);
      const [file] = event.dataTransfer.files;
      if (file) this.actions.open(file);
    });
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    if (event.target.closest("textarea, select, [contenteditable], input:not([type=range])")) return;
    if (event.key === "f") this.fullscreen();
    else if (event.key === "r") this.actions.record();
    else if (event.key === "Escape") this.stage.classList.remove("is-filling");
    else if (event.key === " " && !event.target.closest("button, a")) {
      event.preventDefault(); // no scrolling
      this.actions.pause();
    }
  }
}

function isTouch() {
  return matchMedia("(pointer: coarse)").matches;
}

function press(buttons, key, value) {
  for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset[key] === value));
}

/** Draw the middle of a video so that it fills the canvas. */
function cover(context, video, mirror) {
  const { width, height } = context.canvas;
  const scale = Math.max(width / video.videoWidth, height / video.videoHeight);
  const [w, h] = [video.videoWidth * scale, video.videoHeight * scale];
  context.setTransform(mirror ? -1 : 1, 0, 0, 1, mirror ? width : 0, 0);
  context.drawImage(video, (width - w) / 2, (height - h) / 2, w, h);
  context.resetTransform();
}

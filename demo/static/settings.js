/* The stream's settings in this page: what was asked for, what the server accepted, and what Gradio's controls show. */

const SETTLE_MS = 80; // a dragged slider becomes one message
const NAMES = {
  noise_scale: "Noise",
  steps: "Steps",
  motion_adaptive: "Motion-adaptive noise",
  sink_frames: "Sinks",
  window_frames: "Window",
  seed: "Seed",
  schedule: "Schedule",
  policy: "Policy",
  positions: "Positions",
};
const LONGEST_NAME = 44;

export class Settings {
  /** @param send  called with the changed options, once they have settled */
  constructor(root, send) {
    Object.assign(this, { root, send, wanted: {}, good: {}, changes: {}, toShow: {}, changed: [], last: "prompt" });
    this.page = { on_switch: "keep", max_fps: 30 }; // the server does not know these
    this.styles = [...root.querySelectorAll(".sd-style")];
    this.prompt = this.styles.find((style) => style.getAttribute("aria-pressed") === "true").dataset.prompt;
    this.goodPrompt = this.prompt;
  }

  set(changes) {
    for (const [name, value] of Object.entries(changes)) {
      if (value === null || value === "") continue;
      if (name in this.page) this.page[name] = value;
      else if (name in NAMES) this.changes[name] = this.wanted[name] = value;
    }
    clearTimeout(this.settling);
    this.settling = setTimeout(() => this.#flush(), SETTLE_MS);
  }

  /** Remember the prompt and show it: in the text box, and on its thumbnail if it is one of the styles. */
  showPrompt(prompt) {
    this.prompt = prompt;
    this.last = "prompt";
    for (const style of this.styles) style.setAttribute("aria-pressed", String(style.dataset.prompt === prompt));
    if (typeof prompt === "string") this.show({ prompt });
  }

  /** Short name of the prompt for the status line. */
  get promptName() {
    const style = this.styles.find(({ dataset }) => dataset.prompt === this.prompt);
    const written = typeof this.prompt === "string" ? this.prompt : "Mixed prompts";
    const text = style?.querySelector("span").textContent ?? written;
    return text.length > LONGEST_NAME ? `${text.slice(0, LONGEST_NAME - 1)}…` : text;
  }

  get changedNames() {
    const names = this.changed.map((name) => NAMES[name]);
    return names.length === 1 || names.length === 2 ? names.join(" and ") : "Settings";
  }

  /** The server's settings, of a fresh stream or after a change. */
  accepted(options, prompt = this.goodPrompt) {
    this.good = flat(options);
    this.goodPrompt = prompt;
    for (const name of Object.keys(this.wanted)) this.wanted[name] = this.good[name] ?? this.wanted[name];
    this.show(this.good);
  }

  /** What was chosen while a stream was starting, which it does not know of. */
  late({ options, prompt }) {
    const known = flat(options);
    const changed = Object.entries(this.wanted).filter(([name, value]) => value !== known[name]);
    const isSame = JSON.stringify(prompt) === JSON.stringify(this.prompt);
    return { options: Object.fromEntries(changed), prompt: isSame ? null : this.prompt };
  }

  /** What was asked for last is in use; `what` is "prompt" or "options". */
  applied(what) {
    if (what === "prompt") this.goodPrompt = this.prompt;
    else Object.assign(this.good, this.wanted);
  }

  /** Those of the options that the stream does not have already. */
  differing(options) {
    return Object.fromEntries(Object.entries(options).filter(([name, value]) => value !== this.good[name]));
  }

  /** The server refused: forget what was asked for last, so that a reconnection does not ask again. */
  refused() {
    if (this.last === "prompt") this.prompt = this.goodPrompt;
    else for (const name of this.changed) delete this.wanted[name];
  }

  /** Show and ask for what the server accepted. */
  undo() {
    for (const name of Object.keys(this.wanted)) if (name in this.good) this.wanted[name] = this.good[name];
    this.show(this.good);
    this.showPrompt(this.goodPrompt);
  }

  /** Write values into Gradio's controls: they are handed over when the hidden button asks for them. */
  show(values) {
    Object.assign(this.toShow, values);
    this.root.querySelector("#sd-sync").click();
  }

  /** Values in the order of the controls; controls without a new value are left alone. */
  values(order) {
    const values = this.toShow;
    this.toShow = {};
    return order.map((name) => values[name] ?? { __type__: "update" });
  }

  #flush() {
    const names = Object.keys(this.changes);
    if (!names.length) return;
    this.changed = names;
    this.last = "options";
    this.send(this.changes);
    this.changes = {};
  }
}

/** Options by control name, whether or not the cache's are nested. */
export function flat(options = {}) {
  const { cache = {}, ...rest } = options;
  const all = { ...cache, ...rest };
  return Object.fromEntries(Object.keys(NAMES).filter((name) => all[name] != null).map((name) => [name, all[name]]));
}

/** Settings and prompt where a recipe ends: its start, and what its events changed on the way. */
export function readSettings({ options, prompt, events = [] }) {
  const settings = flat(options);
  for (const event of events) {
    if (event.options) Object.assign(settings, flat(event.options));
    else if (event.prompt) prompt = event.prompt;
  }
  return { options: settings, prompt };
}

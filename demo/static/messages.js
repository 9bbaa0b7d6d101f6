/* What the page says: one status line for what happened, one banner for what went wrong (one sentence, one action). */

/** What is said when a source starts. */
export const PLAYING = {
  sample: "Playing the sample clip.",
  camera: "Camera on. Frames are processed in memory and not kept.",
  file: "Playing your file from this computer, over and over.",
  screen: "Showing your screen. Frames are processed in memory and not kept.",
};
export const RECORDING = {
  start: "Recording starts with a fresh stream, so that its recipe gives the same video again.",
  stop: "Finishing the recording …",
};
/** Of a finished recording. */
export function recorded({ seconds, frames, limit }) {
  const length = `${seconds.toFixed(1)} s, ${frames} frames`;
  return limit ? `The recording stopped by itself at its limit of ${limit}: save it here (${length}).` : `Recorded ${length}.`;
}
/** In the line in front of the model. */
export function inLine({ position, estimate_s }) {
  const time = estimate_s ? `, about ${Math.ceil(estimate_s)} s` : "";
  return `You are number ${position} in line${time}. Your stream starts by itself.`;
}
export const NO_RECIPE = "No recipe yet: the stream is not running.";

/** code -> [sentence, label of the action, name of the action (see `stream.js`)] */
const FAILURES = {
  camera_denied: [
    "The camera is blocked for this page: allow it beside the address bar, then try again.",
    "Try again",
    "camera",
  ],
  no_camera: ["No camera was found: connect one, then look again.", "Look again", "camera"],
  camera_busy: ["The camera could not be started, perhaps because another program uses it.", "Try again", "camera"],
  camera_gone: ["The camera was disconnected; the sample clip plays instead.", "Use the camera", "camera"],
  insecure: [
    "Browsers give the camera only to pages on https or localhost, so what plays now goes on.",
    "Choose a video file",
    "choose_file",
  ],
  no_screen: ["This browser cannot share the screen.", "Choose a video file", "choose_file"],
  screen_denied: ["The screen was not shared, so what plays now goes on.", "Try again", "screen"],
  screen_ended: ["Screen sharing has ended; the sample clip plays instead.", "Share again", "screen"],
  file_too_large: ["Videos may have up to 200 MB and 10 minutes: this one is larger.", "Choose another", "choose_file"],
  file_too_long: ["Videos may have up to 200 MB and 10 minutes: this one is longer.", "Choose another", "choose_file"],
  not_a_video: [
    "That file is no video, and no recipe, snapshot or bundle of this app, so what plays now goes on.",
    "Choose another",
    "choose_file",
  ],
  file_unreadable: [
    "This browser cannot play that file: MP4 (H.264) and WebM work everywhere.",
    "Choose another",
    "choose_file",
  ],
  bad_recipe: ["That file holds no recipe of this app, so nothing was changed.", "Choose another", "choose_file"],
  no_sample: ["The sample clip did not load.", "Try again", "sample"],
  old_browser: [
    "This browser is too old for live video here: a current Chrome, Edge, Firefox or Safari works.",
    "Reload",
    "reload",
  ],
};

/** What the button of a server error does: where the stream goes on, and where it has ended. */
const ACTIONS_WHILE_IT_RUNS = { bad_setting: "undo", too_large: "choose_file", bad_frame: "sample", timeout: "play" };
const ACTIONS_AT_THE_END = {
  bad_setting: "undo",
  out_of_memory: "lighter",
  model_missing: "reconnect",
  worker_crash: "reconnect",
  server_full: "reconnect",
  timeout: "reconnect",
  quota: "reconnect",
};
const ACTION_LABELS = {
  undo: "Undo",
  choose_file: "Choose another file",
  sample: "Use the sample clip",
  lighter: "Use lighter settings",
  reconnect: "Try again",
  reload: "Reload the page",
  play: "Go on",
  dismiss: "OK",
};

export class Messages {
  constructor(root, actions) {
    this.actions = actions;
    this.status = root.querySelector("#sd-status");
    this.banner = root.querySelector("#sd-banner");
    this.text = root.querySelector("#sd-banner-text");
    this.button = root.querySelector("#sd-banner-action");
    this.button.onclick = () => this.#act();
  }

  say(text) {
    this.status.textContent = text;
  }

  /** A failure found in the browser. */
  fail(code) {
    const [sentence, label, action] = FAILURES[code] ?? ["Something went wrong in this page.", "Reload", "reload"];
    this.#show({ code, sentence, label, action });
  }

  /** A failure reported by the server: its sentence, and a button for what can be done about that kind of failure. */
  failServer({ code, sentence, action: advice = "", fatal = false }) {
    const hasEnded = fatal || code === "not_started";
    const usual = hasEnded ? ACTIONS_AT_THE_END[code] ?? "reconnect" : ACTIONS_WHILE_IT_RUNS[code] ?? "dismiss";
    const action = /^reload/i.test(advice) ? "reload" : usual;
    this.#show({ code, sentence, label: ACTION_LABELS[action], action, advice });
  }

  lost(wait_s) {
    const seconds = Math.max(1, Math.round(wait_s));
    const sentence = `The connection was lost; trying again in ${seconds} s with the same settings.`;
    this.#show({ code: "lost", sentence, label: "Reconnect now", action: "reconnect" });
  }

  /** Hide the banner if it shows one of these codes (all codes without arguments). */
  clear(...codes) {
    if (!codes.length || codes.includes(this.code)) {
      this.banner.hidden = true;
      this.code = null;
    }
  }

  #show({ code, sentence, label, action, advice = "" }) {
    this.code = code;
    this.action = action;
    this.banner.dataset.code = code;
    if (this.text.textContent !== sentence) this.text.textContent = sentence;
    this.button.textContent = label;
    this.button.title = advice;
    this.banner.hidden = false;
  }

  #act() {
    const action = this.actions[this.action];
    this.clear();
    action?.();
  }
}

/* Entry of the page: joins source, worker, socket, player, stage, meters and messages, and offers `window.streamdiff`.
   Gradio's controls call `set` and `prompt`; tests read `metrics()` and `lastFrame`. Addresses are relative to this
   file, so the page works below any path and on https. */

import { Frames } from "./frames.js";
import { Messages, NO_RECIPE, PLAYING, RECORDING, inLine, recorded } from "./messages.js";
import { Meters, timeLeft } from "./meters.js";
import { Player } from "./player.js";
import { downloadRecipe, downloadSnapshot, mayHoldRecipe, offerDownloads, readRecipe } from "./recipe.js";
import { Settings, readSettings } from "./settings.js";
import { Socket } from "./socket.js";
import { Source, SourceError } from "./source.js";
import { Stage } from "./stage.js";

const ROOT = new URL("..", import.meta.url);
const REFRESH_MS = 500;
const RECIPE_TIMEOUT_MS = 3000;
const LIGHTER = { steps: 1, window_frames: 2 };

class StreamDiff {
  constructor(root) {
    const actions = this.#actions();
    this.root = root;
    this.settings = new Settings(root, (options) => this.socket.send({ type: "set", options }));
    this.stage = new Stage(root, actions);
    this.messages = new Messages(root, actions);
    this.meters = new Meters(root, () => this.anchor());
    this.player = new Player((frame) => this.stage.draw(frame));
    const video = root.querySelector("#sd-video");
    const onFrame = (frame, now) => this.frames.capture(frame, now, this.source.mirror);
    this.source = new Source(video, new URL("sample.mp4", ROOT).href, onFrame, (code) => this.#fallBack(code));
    const address = new URL("stream", ROOT);
    address.protocol = address.protocol.replace("http", "ws");
    this.socket = new Socket(address.href, {
      opened: () => ({ type: "start", prompt: this.settings.prompt, options: this.settings.wanted }),
      ready: (ready) => this.#ready(ready),
      chunk: (header, jpegs, received) => this.frames.decode(header, jpegs, received),
      message: (message) => this.#message(message),
      lost: (wait_s, attempts) => this.#lost(wait_s, attempts),
    });
    this.frames = new Frames(this.socket, this.player, this.stage);
    for (const button of root.querySelectorAll(".sd-style")) button.onclick = () => this.prompt(button.dataset.prompt);
    setInterval(() => this.meters.showPage(this.metrics(), this.stats), REFRESH_MS);
    this.use("sample");
    if (window.OffscreenCanvas) this.socket.connect();
    else this.messages.fail("old_browser");
  }

  // --- what controls and tests call ---------------------------------------------------------------------------

  /** Change settings of the running stream: {noise_scale: 0.4, ...}. */
  set(changes) {
    this.settings.set(changes);
    this.source.maxFps = this.settings.page.max_fps;
  }

  /** Switch to another prompt, with the chosen policy for the past. */
  prompt(text, on_switch = this.settings.page.on_switch) {
    const prompt = typeof text === "string" ? text.trim() : text;
    if (!prompt) return this.messages.say("Write a prompt first.");
    this.settings.showPrompt(prompt);
    this.socket.send({ type: "prompt", prompt, on_switch });
  }

  /** Values for Gradio's controls, asked for by the hidden button that `Settings` clicks. */
  controlValues(order) {
    return this.settings.values(order);
  }

  /** Forget the past and measure drift from now. */
  anchor() {
    if (this.socket.send({ type: "anchor" })) this.messages.say("Re-anchored: drift is measured from now.");
  }

  /** Play from "sample", "camera" (argument: device id), "file" (argument: File) or "screen". */
  async use(kind, argument) {
    this.messages.clear();
    const { turn } = this.source;
    try {
      await this.source[kind](argument);
      this.#shown();
      if (kind === "camera") this.stage.listCameras(await this.source.cameras(), this.source.cameraId);
      if (this.socket.ready && this.source.kind === kind) this.messages.say(PLAYING[kind]);
    } catch (error) {
      if (!(error instanceof SourceError)) throw error;
      if (this.source.turn === turn) this.messages.fail(error.code); // what played before plays on
      else await this.#fallBack(error.code);
    }
  }

  pause(paused = !this.source.paused) {
    if (!paused) this.messages.clear("timeout");
    this.source.pause(paused);
    this.stage.toggle("pause", paused, paused ? "Play" : "Pause");
    this.messages.say(paused ? "Paused." : "Playing.");
  }

  record() {
    const action = this.recording ? "stop" : "start";
    const side_by_side = this.root.querySelector("#sd-record-both").checked;
    if (!this.socket.send({ type: "record", action, side_by_side })) return;
    this.#showRecording(action === "start" ? { seconds: 0 } : null);
    this.messages.say(RECORDING[action]);
  }

  /** The stream's recipe, as the server knows it. */
  recipe() {
    return new Promise((done, refused) => {
      this.onRecipe = done;
      if (!this.socket.send({ type: "recipe" })) refused(new Error("not connected"));
      setTimeout(() => refused(new Error("no answer")), RECIPE_TIMEOUT_MS);
    });
  }

  /** Settings and prompt from a recipe. */
  load(recipe) {
    const { prompt, options } = readSettings(recipe);
    this.#ask({ prompt, options: this.settings.differing(options) }, "reset");
    this.messages.say("Recipe loaded.");
  }

  get lastFrame() {
    return this.player.lastFrame;
  }

  /** What this page measured, and the last `stats` of the server. */
  metrics() {
    const { player, socket, frames } = this;
    return {
      ...{ connected: Boolean(socket.ready), reconnects: Math.max(0, socket.reconnects), ready: socket.ready },
      ...{ source: this.source.kind, paused: this.source.paused, captured: frames.captured },
      ...{ skipped: frames.skipped + player.skipped, unacked: socket.unacked, queued: player.queue.length },
      ...{ drawn: player.drawn, fps: player.fps, interval_ms: player.interval_ms, ttff_ms: player.ttff_ms },
      ...{ lag_p50_ms: player.lag(50), lag_p95_ms: player.lag(95), lastFrame: player.lastFrame },
      ...{ applied: this.applied ?? null, server: this.stats ?? null },
    };
  }

  // --- messages of the server -----------------------------------------------------------------------------------

  #ready(ready) {
    this.messages.clear("lost", "server_full", "worker_crash", "model_missing");
    this.player.reset();
    this.meters.reset();
    this.stage.begin(ready.size);
    this.#showRecording(null);
    this.#chip("link", "live", "live");
    this.#chip("model", `${ready.preset} on ${ready.device}`);
    const late = this.settings.late(ready);
    this.settings.accepted(ready.options, ready.prompt);
    this.#ask(late);
    this.stage.tag.textContent = this.settings.promptName;
    this.messages.say(this.socket.reconnects ? "Connected again, with the same settings." : PLAYING[this.source.kind]);
  }

  #message(message) {
    const handle = {
      stats: () => this.#stats(message),
      applied: () => this.#applied(message),
      error: () => this.#error(message),
      recipe: () => this.onRecipe?.(message.recipe),
      recording: () => this.#recorded(message),
    }[message.type];
    handle?.();
  }

  #stats(stats) {
    if (stats.waiting) return this.#wait(stats.waiting);
    this.stats = stats;
    this.meters.showStats(stats);
    this.#chip("sessions", stats.sessions > 1 ? `${stats.sessions} viewers` : "");
    this.#chip("time", timeLeft(stats.seconds_left));
    this.#showRecording(stats.recording);
  }

  #wait(place) {
    this.#chip("link", "in line", "wait");
    this.stage.waitFor(inLine(place));
  }

  #applied(applied) {
    this.applied = applied;
    const { what, note, chunk, after_ms } = applied;
    const isPrompt = what === "prompt";
    const name = note === "anchor" ? "Re-anchoring" : isPrompt ? this.settings.promptName : this.settings.changedNames;
    const how = isPrompt && note !== "anchor" && note ? ` (${note})` : "";
    this.messages.say(`${name} applied at chunk ${chunk} after ${(after_ms / 1000).toFixed(1)} s${how}.`);
    if (isPrompt) this.stage.tag.textContent = this.settings.promptName;
    this.settings.applied(what);
  }

  #error(error) {
    if (error.code === "timeout" && !error.fatal && this.source.paused) return; // the viewer knows
    this.messages.failServer(error);
    if (error.fatal) {
      this.#chip("link", "stopped", "lost");
      this.#chip("time", "");
      this.stage.waitFor("");
    }
    if (error.options) this.settings.accepted(error.options); // the server chose others to go on with
    if (error.code === "bad_setting") this.settings.refused();
  }

  #recorded(recording) {
    const { url, mp4, recipe } = recording;
    offerDownloads(this.root, ROOT, { mp4, zip: url, recipe });
    this.messages.say(recorded(recording));
    this.#showRecording(null);
  }

  #lost(wait_s, attempts) {
    this.#chip("link", "offline", "lost");
    this.#showRecording(null);
    if (attempts > 1 || this.socket.reconnects >= 0) this.messages.lost(wait_s);
  }

  // --- actions and what is shown --------------------------------------------------------------------------------

  #actions() {
    return {
      sample: () => this.use("sample"),
      camera: (id) => this.use("camera", id),
      screen: () => this.use("screen"),
      choose_file: () => this.root.querySelector("#sd-file").click(),
      open: (file) => this.#open(file),
      mirror: (mirrored) => (this.source.mirrorCamera = mirrored),
      pause: () => this.pause(),
      play: () => this.pause(false),
      record: () => this.record(),
      snapshot: () => this.#snapshot(),
      recipe: () => this.recipe().then(downloadRecipe, () => this.messages.say(NO_RECIPE)),
      reconnect: () => this.socket.connect(),
      lighter: () => this.#goOn(() => this.#ask({ options: LIGHTER })),
      undo: () => this.#goOn(() => this.settings.undo()),
      reload: () => location.reload(),
    };
  }

  async #open(file) {
    if (!mayHoldRecipe(file)) return this.use("file", file);
    this.messages.clear("bad_recipe");
    const loaded = readRecipe(file).then((recipe) => this.load(recipe));
    await loaded.catch(() => this.messages.fail("bad_recipe"));
  }

  async #snapshot() {
    const picture = this.stage.picture(); // of now: the recipe may take a moment
    const recipe = await this.recipe().catch(() => null);
    await downloadSnapshot(picture, recipe);
    this.messages.say(`Snapshot saved, ${recipe ? "its recipe inside" : "without a recipe: the stream is not running"}.`);
  }

  /** Settings that no control was moved for: the controls follow. */
  #ask({ options, prompt }, on_switch) {
    this.set(options);
    this.settings.show(options);
    if (prompt) this.prompt(prompt, on_switch);
  }

  /** With other settings: in this stream, or in a new one if it has ended. */
  #goOn(change) {
    change();
    if (!this.socket.ready) this.socket.connect();
  }

  /** A source failed: say it, and let the sample clip play on. */
  async #fallBack(code) {
    this.messages.fail(code);
    if (code !== "no_sample" && this.source.kind !== "sample") await this.source.sample().catch(() => {});
    this.#shown();
  }

  #shown() {
    this.stage.showSource(this.source.kind);
    this.stage.toggle("pause", this.source.paused, this.source.paused ? "Play" : "Pause");
  }

  #showRecording(recording) {
    this.recording = recording ?? null;
    this.stage.showRecording(recording);
  }

  #chip(id, text, state) {
    const chip = this.root.querySelector(`#sd-${id}`);
    Object.assign(chip, { textContent: text, hidden: !text });
    if (state) chip.dataset.state = state;
  }
}

/** Gradio builds the page after this script is read: start when stage and controls are there. */
function start() {
  const parts = ["#sd-stage", "#sd-meters .sd-numbers", "#sd-gallery .sd-style", "#sd-sync"];
  const isThere = parts.every((part) => document.querySelector(part));
  if (isThere) window.streamdiff = new StreamDiff(document);
  else requestAnimationFrame(start);
}
start();

/* The live figures: numbers, time per stage, the KV cache, motion and noise, drift. Colours come from style.css. */

const STAGE_ORDER = ["border", "encode", "denoise", "decode"];
const STAGE_NAMES = { border: "resize", encode: "encode", denoise: "denoise", decode: "decode" };
const HISTORY = 120;
const FORGOTTEN_SHOWN = 3;
const MANY_CELLS = 8;
const MUCH_DRIFT = { colour: 8, contrast: 1.6, sharpness: 2 }; // as in streamdiff_core/drift.py; ratios but for colour
const MUCH_AT = 0.75; // place on the bar

export class Meters {
  constructor(root, onAnchor) {
    this.find = (id) => root.querySelector(`#sd-${id}`);
    this.history = new Map();
    this.curve = this.find("curve");
    this.find("anchor").onclick = onAnchor;
  }

  reset() {
    this.history.clear();
  }

  /** Numbers measured in this page, about twice a second. */
  showPage({ fps, ttff_ms, lag_p50_ms, lag_p95_ms, skipped }, stats) {
    this.#put("fps", fps ? fps.toFixed(1) : "–");
    this.#put("ttff", time(ttff_ms));
    this.#put("lag-p50", time(lag_p50_ms));
    this.#put("lag-p95", time(lag_p95_ms));
    this.#put("dropped", String(skipped + (stats?.dropped ?? 0)));
    this.#put("late-label", stats?.lag_budget_ms ? `Later than ${time(stats.lag_budget_ms)}` : "Late");
    this.#put("late", stats?.deadline_miss_rate == null ? "–" : `${(100 * stats.deadline_miss_rate).toFixed(0)} %`);
  }

  /** A `stats` message of the server. */
  showStats(stats) {
    this.#stages(stats.stage_ms ?? {});
    if (stats.cache) this.#cache(stats.cache);
    if (stats.history) this.#history(stats.history);
    if (stats.drift) this.#drift(stats.drift);
  }

  #put(id, text) {
    const place = this.find(id);
    if (place.textContent !== text) place.textContent = text;
  }

  #stages(stage_ms) {
    const known = STAGE_ORDER.filter((name) => stage_ms[name] > 0);
    const others = Object.keys(stage_ms).filter((name) => !STAGE_ORDER.includes(name) && stage_ms[name] > 0);
    const stages = [...known, ...others].map((name) => ({ name, ms: stage_ms[name] }));
    const total = stages.reduce((sum, { ms }) => sum + ms, 0);
    this.#put("stage-total", total ? time(total) : "");
    const label = ({ name, ms }) => `${STAGE_NAMES[name] ?? name} ${ms.toFixed(ms < 10 ? 1 : 0)} ms`;
    const bars = stages.map((stage) => {
      const bar = make("i", `stage-${stage.name}`);
      bar.style.flexGrow = stage.ms;
      bar.title = label(stage);
      return bar;
    });
    this.find("stack").replaceChildren(...bars);
    this.find("stack").ariaLabel = `Milliseconds per stage: ${stages.map(label).join(", ")}`;
    this.find("stack-legend").replaceChildren(...stages.map((s) => make("li", `stage-${s.name}`, label(s))));
  }

  /** In the order of time. A frame before the newest that fills no slot was forgotten; the last few are shown. */
  #cache({ slots, noise_scale }) {
    const kept = new Set(slots.map(({ frame }) => frame));
    const newest = slots.find(({ frame }) => frame === Math.max(...kept));
    const gone = [];
    for (let frame = newest?.frame ?? 0; frame >= 0 && gone.length < FORGOTTEN_SHOWN; frame -= 1) {
      if (!kept.has(frame)) gone.unshift({ role: "evicted", frame });
    }
    const all = [...slots, ...gone].sort((a, b) => a.frame - b.frame);
    const signature = JSON.stringify([all, noise_scale]);
    if (signature === this.cacheShown) return;
    this.cacheShown = signature;
    const cells = all.map((slot) => {
      const cell = make("div", slot.role);
      const { frame, role, position } = slot;
      const isGone = role === "evicted";
      cell.append(make("b", "", frame), make("small", "", isGone ? "gone" : `at ${position}`));
      const place = `${role}, slot ${slot.slot}, position ${position}`;
      cell.title = `Frame ${frame}: ${isGone ? "forgotten" : place}`;
      if (slot === newest) cell.classList.add("newest");
      return cell;
    });
    this.find("cache").replaceChildren(...cells);
    this.find("cache").classList.toggle("many", cells.length > MANY_CELLS);
    const list = (role) => all.filter((slot) => slot.role === role).map(({ frame }) => frame).join(", ") || "none";
    const roles = [...new Set(all.map(({ role }) => role))];
    this.find("cache").ariaLabel = `KV cache: ${roles.map((role) => `${role} ${list(role)}`).join("; ")}`;
    this.find("cache").style.setProperty("--noise", noise_scale ?? 0);
    this.#put("cache-note", noise_scale == null ? "" : `noise ${noise_scale.toFixed(2)}`);
  }

  #history({ chunk, motion, noise_scale }) {
    chunk.forEach((index, i) => this.history.set(index, { motion: motion[i], noise: noise_scale[i] }));
    for (const index of this.history.keys()) {
      if (this.history.size <= HISTORY) break;
      this.history.delete(index);
    }
    this.#drawCurve([...this.history.values()]);
  }

  #drawCurve(points) {
    const { curve } = this;
    const ratio = devicePixelRatio;
    const [width, height] = [curve.clientWidth, curve.clientHeight];
    if (!width || !points.length) return;
    if (curve.width !== Math.round(width * ratio)) {
      Object.assign(curve, { width: Math.round(width * ratio), height: Math.round(height * ratio) });
    }
    const context = curve.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    const colours = getComputedStyle(curve);
    const most = Math.max(1e-6, ...points.map(({ motion }) => motion ?? 0));
    const line = (name, value, dash) => {
      context.beginPath();
      points.forEach((point, i) => {
        const x = 2 + ((width - 4) * (HISTORY - points.length + i)) / (HISTORY - 1);
        const y = height - 3 - (height - 6) * Math.min(1, Math.max(0, value(point)));
        if (i) context.lineTo(x, y);
        else context.moveTo(x, y);
      });
      Object.assign(context, { strokeStyle: colours.getPropertyValue(name), lineWidth: 2, lineJoin: "round" });
      context.setLineDash(dash);
      context.stroke();
    };
    line("--sd-motion", ({ motion }) => (motion ?? 0) / most, []);
    line("--sd-noise", ({ noise }) => noise ?? 0, [5, 3]);
    const { motion, noise } = points.at(-1);
    this.#put("motion-now", (motion ?? 0).toFixed(2));
    this.#put("noise-now", (noise ?? 0).toFixed(2));
    const now = `motion now ${motion?.toFixed(2)}, noise scale ${noise?.toFixed(2)}`;
    curve.ariaLabel = `Last ${points.length} chunks: ${now}`;
  }

  #drift(drift) {
    const words = { ok: "steady", some: "some", much: "much" };
    this.#put("drift-level", words[drift.level] ?? "");
    this.find("drift-level").dataset.level = drift.level ?? "";
    for (const meter of this.find("drift").querySelectorAll("[data-drift]")) {
      const name = meter.dataset.drift;
      const value = drift[name];
      if (value == null) continue;
      const isRatio = name !== "colour";
      const share = isRatio ? Math.abs(Math.log(value)) / Math.log(MUCH_DRIFT[name]) : value / MUCH_DRIFT[name];
      const text = isRatio ? `×${value.toFixed(2)}` : value.toFixed(1);
      meter.ariaValueNow = Math.min(1, share * MUCH_AT).toFixed(2);
      meter.ariaValueText = text;
      meter.classList.toggle("much", share >= 1);
      meter.style.setProperty("--value", Math.min(1, share * MUCH_AT));
      meter.nextElementSibling.textContent = text;
    }
  }
}

function make(tag, className, text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

function time(ms) {
  if (ms == null) return "–";
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
}

/** What a viewer whose stream ends is told; nothing without an end. */
export function timeLeft(seconds) {
  if (seconds == null) return "";
  return seconds < 90 ? `${Math.ceil(seconds)} s left` : `${Math.round(seconds / 60)} min left`;
}

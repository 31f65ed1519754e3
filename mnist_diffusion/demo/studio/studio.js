// Draws with a diffusion model in the browser. The plan of each sampler, a few numbers a step, comes from the pipeline.
import * as ort from "./ort.wasm.min.mjs";

ort.env.wasm.numThreads = 1; // more need headers that a plain file server does not send
const element = (id) => document.getElementById(id);
const settings = await (await fetch("settings.json")).json();
const [channels, height, width] = settings.shape;
const pixels = channels * height * width;
const sessions = new Map();

// Standard normal noise from a number: mulberry32 and Box-Muller.
function noiseOf(seed) {
  let state = seed >>> 0;
  const uniform = () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  };
  const normal = () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
  return () => Float32Array.from({ length: pixels }, normal);
}

// Spherical interpolation between two noises, which keeps their norm.
function slerp(start, end, share) {
  let dot = 0, first = 0, second = 0;
  for (let i = 0; i < start.length; i++) {
    dot += start[i] * end[i]; first += start[i] ** 2; second += end[i] ** 2;
  }
  const angle = Math.acos(Math.min(1, Math.max(-1, dot / Math.sqrt(first * second))));
  const from = Math.sin((1 - share) * angle) / Math.sin(angle), to = Math.sin(share * angle) / Math.sin(angle);
  return start.map((value, i) => from * value + to * end[i]);
}

async function sessionOf(model) {
  if (!sessions.has(model.file)) sessions.set(model.file, ort.InferenceSession.create(model.file));
  return sessions.get(model.file);
}

// One pass over rows [sample, label], all at one timestep: a prediction for each.
async function pass(model, rows, timestep) {
  const sample = new Float32Array(rows.length * pixels);
  rows.forEach(([each], i) => sample.set(each, i * pixels));
  const inputs = {
    sample: new ort.Tensor("float32", sample, [rows.length, channels, height, width]),
    timestep: new ort.Tensor("float32", new Float32Array(rows.length).fill(timestep), [rows.length]),
    class_labels: new ort.Tensor("int64", BigInt64Array.from(rows, ([, label]) => BigInt(label)), [rows.length]),
  };
  const { prediction } = await (await sessionOf(model)).run(inputs);
  return rows.map((_, i) => prediction.data.subarray(i * pixels, (i + 1) * pixels));
}

// The guided predictions for samples [{ sample, shares: [[class, share], ...] }] at one timestep.
async function predict(model, items, scale, timestep) {
  const level = timestep / settings.num_train_timesteps;
  const inside = model.interval[0] <= level && level <= model.interval[1];
  const strength = model.scales ? 1 : inside ? scale : Math.min(scale, 1);
  const offset = model.scales ? settings.names.length * model.scales.indexOf(scale) : 0;
  const rows = [];
  for (const { sample, shares } of items) {
    if (strength !== 0) for (const [label] of shares) rows.push([sample, label + offset]);
    if (strength !== 1) rows.push([sample, model.null_class]);
  }
  const found = await pass(model, rows, timestep);
  return items.map(({ shares }) => {
    const conditional = new Float32Array(pixels);
    if (strength !== 0) for (const [, share] of shares) {
      const each = found.shift();
      for (let i = 0; i < pixels; i++) conditional[i] += share * each[i];
    }
    if (strength === 1) return conditional;
    const free = found.shift();
    return conditional.map((value, i) => free[i] + strength * (value - free[i]));
  });
}

// Denoise samples together; `now` gives classes and scale, which may change between steps. Yields after each step.
async function* denoise(model, noises, count, now, fresh) {
  let samples = noises, before = noises.map(() => new Float32Array(pixels));
  for (const [index, step] of model.plans[count].entries()) {
    const { shares, scale } = now();
    const outputs = await predict(model, samples.map((sample, i) => ({ sample, shares: shares[i] })), scale, step.t);
    const clean = samples.map((sample, i) => sample.map((x, j) => {
      const value = step.p * x + step.q * outputs[i][j];
      return step.clip ? Math.min(1, Math.max(-1, value)) : value;
    }));
    const noise = step.d ? fresh() : null; // the same for all, as the noise that they begin with
    samples = samples.map((sample, i) => sample.map((x, j) =>
      step.a * x + step.b * clean[i][j] + step.c * before[i][j] + (noise ? step.d * noise[j] : 0)));
    before = clean;
    yield { index, samples, clean };
  }
}

const bytesOf = (image) => Uint8ClampedArray.from(image, (value) => Math.round((Math.min(1, Math.max(-1, value)) + 1) * 127.5));

function paint(canvas, image) {
  canvas.width = width; canvas.height = height;
  const bytes = bytesOf(image), area = width * height, data = new ImageData(width, height);
  for (let i = 0; i < area; i++) {
    for (let c = 0; c < 3; c++) data.data[4 * i + c] = bytes[(channels === 3 ? c * area : 0) + i];
    data.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(data, 0, 0);
}

export { bytesOf, denoise, noiseOf, settings }; // for whoever compares them with the pipeline

// The page.

const state = { model: settings.models[0], label: 0, run: 0 };
const number = (id) => Number(element(id).value);
const shown = (label) => settings.names[label];

function choices(place, names, chosen, act) {
  names.forEach((name, i) => {
    const button = document.createElement("button");
    Object.assign(button, { type: "button", textContent: name });
    button.setAttribute("aria-pressed", String(i === chosen));
    button.addEventListener("click", () => {
      for (const each of place.querySelectorAll("button")) each.setAttribute("aria-pressed", String(each === button));
      act(i);
    });
    place.append(button);
  });
}

function setModel(model) {
  state.model = model;
  const scale = element("scale"), count = element("count"), counts = Object.keys(model.plans).map(Number);
  const last = model.scales ? model.scales.length - 1 : Math.max(6, model.scale);
  Object.assign(scale, { min: 0, max: last, step: model.scales ? 1 : 0.05 });
  scale.value = model.scales ? rising(model).indexOf(model.scale) : model.scale;
  Object.assign(count, { min: 0, max: counts.length - 1, step: 1 });
  count.value = counts.indexOf(model.steps);
}

const rising = (model) => [...model.scales].sort((a, b) => a - b);
const scaleNow = () => (state.model.scales ? rising(state.model)[number("scale")] : number("scale"));
const countNow = () => Object.keys(state.model.plans).map(Number).sort((a, b) => a - b)[number("count")];

function say() {
  const words = { scale: scaleNow().toFixed(2), count: countNow(), mix: `${Math.round(100 * number("mix"))}%` };
  words.walk = `${Math.round(100 * number("walk"))}%`;
  for (const [id, text] of Object.entries(words)) {
    element(`${id}-value`).textContent = text;
    element(id).setAttribute("aria-valuetext", text);
  }
}

function now() {
  const mix = number("mix"), other = Number(element("other").value);
  const shares = mix > 0 && other !== state.label ? [[state.label, 1 - mix], [other, mix]] : [[state.label, 1]];
  return { shares: [shares], scale: scaleNow() };
}

// Lets the browser show what there is, and hear the visitor: a pass does not.
const pause = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

async function draw() {
  const run = ++state.run, slow = element("slow").checked, still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  say();
  const { model } = state, count = countNow(), seed = number("seed"), walk = number("walk");
  const start = performance.now();
  let noise = noiseOf(seed)();
  if (walk > 0) noise = slerp(noise, noiseOf(seed + 1)(), walk);
  const strip = element("steps"), fresh = noiseOf(seed + 7919), kept = [];
  for await (const { index, samples, clean } of denoise(model, [noise], count, now, fresh)) {
    if (run !== state.run) return;
    const last = index === count - 1;
    kept.push(last ? samples[0] : clean[0]);
    if (!still || last) paint(element("picture"), kept.at(-1));
    await pause(slow && !last ? 500 : 0);
    if (run !== state.run) return;
  }
  const seconds = (performance.now() - start) / 1000;
  element("caption").textContent =
    `${shown(state.label)}, ${count} step${count > 1 ? "s" : ""}, guidance ${scaleNow().toFixed(2)}, in ${seconds.toFixed(2)} s`;
  element("picture").setAttribute("aria-label", `A picture of ${shown(state.label)}`);
  strip.replaceChildren(...kept.map((image, i) => {
    const button = document.createElement("button"), canvas = document.createElement("canvas");
    Object.assign(button, { type: "button", title: `After step ${i + 1}` });
    button.setAttribute("aria-label", `After step ${i + 1}`);
    button.append(canvas);
    button.addEventListener("click", () => paint(element("picture"), image));
    paint(canvas, image);
    return button;
  }));
  document.documentElement.dataset.drawn = String(run); // for whoever waits for it
  await drawAll(run, model, count, noise, seed);
}

// The first ten classes from the same noise, without what is mixed in.
async function drawAll(run, model, count, noise, seed) {
  const labels = settings.names.slice(0, 10).map((_, label) => label);
  const classes = () => ({ shares: labels.map((label) => [[label, 1]]), scale: scaleNow() });
  let last;
  for await (last of denoise(model, labels.map(() => noise), count, classes, noiseOf(seed + 7919))) {
    await pause(0);
    if (run !== state.run) return;
  }
  element("all").replaceChildren(...labels.map((label) => {
    const canvas = document.createElement("canvas");
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `Class ${shown(label)}`);
    paint(canvas, last.samples[label]);
    return canvas;
  }));
}

// A change restarts the drawing, but for one that steers a slow one.
function changed() {
  say();
  if (!element("slow").checked || document.documentElement.dataset.drawn === String(state.run)) draw().catch(fail);
}

function fail(error) {
  element("status").textContent = `Something went wrong: ${error.message}`;
  element("status").hidden = false;
  throw error;
}

try {
  element("status").textContent = "Loading the network…";
  await sessionOf(state.model);
  document.querySelector("h1").textContent = document.title = settings.title;
  choices(element("models"), settings.models.map((each) => each.name), 0, (i) => { setModel(settings.models[i]); draw().catch(fail); });
  choices(element("classes"), settings.names, 0, (i) => { state.label = i; changed(); });
  element("other").append(...settings.names.map((name, i) => new Option(name, i)));
  element("other").setAttribute("aria-label", "Another class");
  for (const id of ["mix", "other", "scale"]) element(id).addEventListener("input", changed);
  for (const id of ["count", "seed", "walk"]) element(id).addEventListener("input", () => draw().catch(fail));
  element("draw").addEventListener("click", () => draw().catch(fail));
  element("next").addEventListener("click", () => { element("seed").value = number("seed") + 1; draw().catch(fail); });
  element("save").addEventListener("click", () => {
    const link = document.createElement("a");
    Object.assign(link, { download: `${shown(state.label)}-${number("seed")}.png`, href: element("picture").toDataURL() });
    link.click();
  });
  document.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
  setModel(state.model);
  element("room").hidden = false;
  await draw();
  element("status").hidden = true;
} catch (error) {
  fail(error);
}

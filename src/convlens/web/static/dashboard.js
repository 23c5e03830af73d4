// The dashboard: polls the runs once a second and redraws what has changed.
"use strict";

const SVG = "http://www.w3.org/2000/svg", WIDTH = 480, HEIGHT = 220, LEFT = 46, BOTTOM = 24, COLORS = 6;
const colorOf = (number) => `var(--run${number % COLORS})`;

function formatTime(seconds) {
  if (seconds < 100) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 100 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function element(parent, name, attributes = {}, text = "") {
  const made = parent.appendChild(parent.namespaceURI === SVG ? document.createElementNS(SVG, name) : document.createElement(name));
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

// about four round numbers between two values
function ticks(low, high) {
  const rough = (high - low) / 4 || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((times) => times * power).find((size) => size >= rough);
  const found = [];
  for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + 1e-9 * step; value += step) found.push(value);
  return found;
}

// draw one chart: lines of points (epoch, value), each in the color of its run
function chart(id, lines, isAccuracy) {
  const points = lines.flatMap((line) => line.points), parent = at(id);
  parent.replaceChildren();
  if (!points.length) return element(parent, "p", { class: "quiet" }, "Nothing yet.");
  const values = points.map(([, value]) => value);
  let [low, high] = [Math.min(...values), Math.max(...values)];
  [low, high] = isAccuracy ? [Math.max(low - 0.05 * (1 - low) - 0.001, 0), 1] : [0, high * 1.05 || 1];
  const last = Math.max(...points.map(([epoch]) => epoch), 1);
  const x = (epoch) => LEFT + (epoch / last) * (WIDTH - LEFT - 8), y = (value) => 6 + (1 - (value - low) / (high - low)) * (HEIGHT - BOTTOM - 6);
  const svg = parent.appendChild(document.createElementNS(SVG, "svg"));
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", lines.map(({ name, points: own }) => `${name}: ${own.length ? formatValue(own.at(-1)[1], isAccuracy) : "nothing yet"}`).join(", "));
  for (const value of ticks(low, high)) {
    element(svg, "line", { class: "grid", x1: LEFT, x2: WIDTH - 8, y1: y(value), y2: y(value) });
    element(svg, "text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, formatValue(value, isAccuracy, true));
  }
  for (const value of ticks(0, last)) element(svg, "text", { x: x(value), y: HEIGHT - 6, "text-anchor": "middle" }, Number(value.toPrecision(4)));
  for (const { number, points: own } of lines) {
    element(svg, "polyline", { points: own.map(([epoch, value]) => `${x(epoch)},${y(value)}`).join(" "), style: `stroke: ${colorOf(number)}` });
    if (own.length) element(svg, "circle", { cx: x(own.at(-1)[0]), cy: y(own.at(-1)[1]), r: 3.5, style: `fill: ${colorOf(number)}` });
  }
  return svg;
}

function formatValue(value, isAccuracy, short = false) {
  return isAccuracy ? `${Number((100 * value).toFixed(short ? 1 : 2))}%` : String(Number(value.toPrecision(short ? 2 : 4)));
}

// the line of a run on a chart: the finished epochs, and for training metrics the running epoch
function lineOf(run, number, column) {
  const points = run.metrics.filter((row) => row[column] !== null && row[column] !== undefined).map((row) => [row.epoch, row[column]]);
  const { progress } = run, running = { train_loss: progress?.loss, train_acc: progress?.accuracy }[column];
  if (running !== undefined && progress.epoch > run.metrics.length) points.push([progress.epoch, running]);
  return { name: run.name, number, points };
}

const SILENT_SECONDS = 60; // without an update, a training has probably stopped
const cards = [];
function showRun(run, number) {
  const content = JSON.stringify(run);
  if (cards[number] === content) return;
  cards[number] = content;
  const card = at("runs").children[number] ?? element(at("runs"), "section", { class: "run", style: `--color: ${colorOf(number)}` });
  card.replaceChildren();
  element(card, "h2", {}, run.name);
  const { progress, test } = run, seconds = run.metrics.at(-1)?.seconds;
  const done = test ? 1 : progress ? progress.step / progress.total : 0;
  let state = "Starting", more = "";
  if (test) {
    state = `${(100 * test.accuracy).toFixed(2)}% test accuracy`;
    const [low, high] = test.accuracy_ci95.map((fraction) => (100 * fraction).toFixed(2));
    more = `95% interval ${low}% to ${high}%, n = ${test.num_images.toLocaleString("en")}; trained for ${formatTime(seconds ?? 0)}.`;
  } else if (progress?.seconds_since_update > SILENT_SECONDS) {
    state = `Stopped at ${Math.floor(100 * done)}%`;
    more = `No update for ${formatTime(progress.seconds_since_update)}. To resume: convlens train --resume`;
  } else if (done >= 1) state = "Testing";
  else if (progress) {
    state = `Epoch ${Math.floor(progress.epoch) + 1}, ${Math.floor(100 * done)}%`;
    more = `${Math.round(progress.images_per_second).toLocaleString("en")} images/s, ${formatTime(progress.eta_seconds)} left.`;
  }
  element(card, "p", { class: "state" }, state);
  const track = element(card, "div", { class: "track", role: "progressbar", "aria-valuenow": Math.round(100 * done), "aria-label": `Progress of ${run.name}` });
  element(track, "div", { class: "fill", style: `width: ${100 * done}%` });
  element(card, "p", {}, more);
  if (test) element(element(card, "p"), "a", { href: `${number}/report.html` }, "Report");
  if (run.data) element(card, "p", { class: "quiet" }, `${run.data}, recipe ${run.recipe}, model ${run.model}, seed ${run.seed}`);
}

const shownMistakes = [];
async function showMistakes(runs) {
  for (const [number, run] of runs.entries()) {
    if (!run.mistakes || shownMistakes[number] === run.mistakes) continue;
    const { epoch, asked, wrong, shape, mistakes } = await (await fetch(`${number}/mistakes.json`)).json();
    shownMistakes[number] = run.mistakes;
    if (!at(`mistakes-${number}`)) {
      if (!shownMistakes.some((_, other) => other !== number && at(`mistakes-${other}`))) at("mistakes").replaceChildren();
      element(at("mistakes"), "div", { id: `mistakes-${number}` });
    }
    const parent = at(`mistakes-${number}`);
    parent.replaceChildren();
    element(parent, "p", {}, `${runs.length > 1 ? `${run.name}: ` : ""}${wrong} of ${asked} validation images after epoch ${epoch}${wrong > mistakes.length ? `; the ${mistakes.length} most confident` : ""}`);
    const grid = element(parent, "div", { class: "wrong" });
    for (const { label, guess, probability, pixels } of mistakes) {
      const figure = element(grid, "figure"), [, height, width] = shape;
      const canvas = element(figure, "canvas", { role: "img", "aria-label": `${label} classified as ${guess}` });
      paint(canvas, width, height, pixelColor(unpack(pixels), shape));
      element(figure, "figcaption", {}, `predicted ${guess}, ${percent(probability)}`);
      element(figure, "figcaption", {}, `true class ${label}`);
    }
  }
}

function pageTitle(runs) {
  if (runs.length > 1) return `${runs.length} runs, ${runs.filter((run) => run.test).length} finished`;
  const [{ name, test, progress }] = runs;
  return `${name}: ${test ? "finished" : progress?.seconds_since_update > SILENT_SECONDS ? "stopped" : "training"}`;
}

async function show(runs) {
  at("title").textContent = document.title = pageTitle(runs);
  runs.forEach(showRun);
  for (const column of ["train_loss", "train_acc", "val_loss", "val_acc"]) {
    chart(column, runs.map((run, number) => lineOf(run, number, column)), column.endsWith("acc"));
  }
  await showMistakes(runs);
}

let shown = "";
async function poll() {
  setTimeout(poll, 1000);
  let text = null;
  try {
    text = await (await fetch("runs.json")).text();
  } catch {
    at("lost").textContent = "The server of this page has stopped; below is its last state. `convlens watch RUN` shows a run at any time.";
  }
  at("lost").hidden = text !== null;
  if (text === null || text === shown) return;
  await show(JSON.parse(text));
  shown = text;
}
poll();

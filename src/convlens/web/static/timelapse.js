// The time machine: a slider over the snapshots of a training; everything on the page follows it.
"use strict";

const model = JSON.parse(at("model").textContent);
const { moments, classes } = model;
const tellEpoch = (epoch) => (epoch < 1 ? String(Number(epoch.toPrecision(2))) : String(Number(epoch.toPrecision(4))));

// red for what adds, white for nothing, blue for what takes away; from -1 to 1
function signed(value) {
  const [r, g, b] = value > 0 ? [178, 24, 43] : [33, 102, 172], share = Math.abs(value);
  return [r, g, b].map((level) => 247 + (level - 247) * share);
}

// the bars keep their places: all classes, or of many those that are likeliest at the end
const end = moments.at(-1).probabilities, last = end.indexOf(Math.max(...end));
const shownClasses = classes.length <= MOST_BARS ? [...classes.keys()] : [...classes.keys()].sort((a, b) => end[b] - end[a]).slice(0, MOST_BARS);

function canvases(parent, count) {
  return Array.from({ length: count }, () => parent.appendChild(document.createElement("canvas")));
}

function paintPicture() {
  const [, height, width] = model.shape;
  paint(at("picture"), width, height, pixelColour(unpack(model.pixels), model.shape));
}

const kernelCanvases = canvases(at("kernels"), model.kernels[0]);
function paintKernels(moment) {
  const [, channels, height, width] = model.kernels, values = unpack(moment.kernels), size = height * width;
  kernelCanvases.forEach((canvas, number) => {
    const start = number * channels * size;
    paint(canvas, width, height, (i) =>
      channels === 3 ? [0, 1, 2].map((c) => values[start + c * size + i]) : signed(values[start + i] / 127.5 - 1),
    );
  });
}

const stageCanvases = model.stages.map(({ name, count, shown }) => {
  const stage = at("stages").appendChild(document.createElement("div"));
  stage.appendChild(document.createElement("h3")).textContent =
    `${name}: ${count} maps of ${shown[2]} × ${shown[1]}${count > shown[0] ? `, ${shown[0]} shown` : ""}`;
  const maps = stage.appendChild(document.createElement("div"));
  maps.className = "maps";
  maps.setAttribute("role", "img");
  maps.setAttribute("aria-label", `${shown[0]} feature maps of ${name}`);
  return canvases(maps, shown[0]);
});
function paintMaps(moment) {
  model.stages.forEach(({ shown }, s) => {
    const [, height, width] = shown, values = unpack(moment.maps[s]), size = height * width;
    stageCanvases[s].forEach((canvas, number) => paint(canvas, width, height, (i) => glow(values[number * size + i] / 255)));
  });
}

function paintMatrix(moment) {
  const count = classes.length;
  paint(at("matrix"), count, count, (i) => {
    const row = moment.confusion[Math.floor(i / count)], share = Math.sqrt(row[i % count] / Math.max(row.reduce((a, b) => a + b), 1));
    return [247, 250, 255].map((level, c) => level + ([8, 48, 107][c] - level) * share);
  });
}

// a line through the moments, evenly spaced, of values from 0 to 1
function line(values, kind) {
  const path = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  path.setAttribute("points", values.map((value, i) => `${i},${1 - value}`).join(" "));
  path.setAttribute("class", kind);
  at("curve").appendChild(path);
}

function drawCurve() {
  at("curve").setAttribute("viewBox", `0 0 ${Math.max(moments.length - 1, 1)} 1`);
  line(moments.map((m) => m.accuracy), "line");
  line(moments.map((m) => m.probabilities[last]), "line own");
  const now = document.createElementNS("http://www.w3.org/2000/svg", "line");
  now.id = "now";
  now.setAttribute("class", "now");
  now.setAttribute("y1", 0);
  now.setAttribute("y2", 1);
  at("curve").appendChild(now);
}

function show(number) {
  const moment = moments[number], { probabilities } = moment;
  at("when").textContent = `Epoch ${tellEpoch(moment.epoch)}: ${percent(moment.accuracy)} right`;
  at("slider").setAttribute("aria-valuetext", `epoch ${tellEpoch(moment.epoch)}`);
  for (const end of ["x1", "x2"]) at("now").setAttribute(end, number);
  at("curve-text").textContent =
    `Solid: share of ${model.images} that it has right, now ${percent(moment.accuracy)}. Dashed: how probable it finds “${classes[last]}” for the picture below. The first epoch is drawn out, for most happens there.`;
  at("bars").replaceChildren(...shownClasses.map((i) => bar(classes[i], probabilities[i])));
  const best = probabilities.indexOf(Math.max(...probabilities));
  at("verdict").textContent = `${model.picture}: “${classes[best]}”, ${percent(probabilities[best])}.`;
  paintKernels(moment);
  paintMaps(moment);
  if (moment.confusion) paintMatrix(moment);
}

let playing = 0;
function stop() {
  clearInterval(playing);
  playing = 0;
  at("play").textContent = "Play";
}

function play() {
  if (playing) return stop();
  const slider = at("slider");
  if (Number(slider.value) === moments.length - 1) slider.value = 0;
  show(Number(slider.value));
  at("play").textContent = "Pause";
  playing = setInterval(() => {
    slider.value = Number(slider.value) + 1;
    show(Number(slider.value));
    if (Number(slider.value) === moments.length - 1) stop();
  }, 300);
}

at("title").textContent = `How ${model.name} learned`;
at("subtitle").textContent = `The net “${model.net}” on ${model.data}, from random weights to the end of its training: ${moments.length} looks at it. Move the slider, or use the arrow keys.`;
at("kernels-text").textContent = model.kernels[1] === 3 ? "Each filter looks for a small pattern, in the colours that it is shown in." : "Each filter looks for a small pattern: red where light adds to its answer, blue where light takes away.";
const named = classes.some((name) => name.length > 2);
at("bars").classList.toggle("bars-named", named);
at("matrix-said").classList.toggle("upright", named);
for (const place of ["matrix-true", "matrix-said"]) {
  // more names than these would stand closer than their letters are high
  for (const name of classes.length <= MOST_BARS ? classes : []) at(place).appendChild(document.createElement("span")).textContent = name;
}
if (!moments[0].confusion) {
  at("matrix-grid").hidden = true;
  at("matrix-text").textContent = `With ${classes.length} classes this is too large to be shown here.`;
}
at("slider").max = moments.length - 1;
at("slider").value = moments.length - 1;
at("slider").addEventListener("input", () => {
  stop();
  show(Number(at("slider").value));
});
at("play").onclick = play;
drawCurve();
paintPicture();
show(moments.length - 1);

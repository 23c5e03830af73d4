// The timelapse: a slider over the snapshots of a training; everything on the page follows it.
"use strict";

const model = JSON.parse(at("model").textContent);
const { snapshots, classes } = model;
const formatEpoch = (epoch) => (epoch < 1 ? String(Number(epoch.toPrecision(2))) : String(Number(epoch.toPrecision(4))));

// diverging colormap from -1 to 1: blue, white, red
function divergingColor(value) {
  const [r, g, b] = value > 0 ? [178, 24, 43] : [33, 102, 172], strength = Math.abs(value);
  return [r, g, b].map((level) => 247 + (level - 247) * strength);
}

// the bars keep their order: all classes, or the most probable ones at the end
const end = snapshots.at(-1).probabilities, last = end.indexOf(Math.max(...end));
const shownClasses = classes.length <= MAX_BARS ? [...classes.keys()] : [...classes.keys()].sort((a, b) => end[b] - end[a]).slice(0, MAX_BARS);

function canvases(parent, count) {
  return Array.from({ length: count }, () => parent.appendChild(document.createElement("canvas")));
}

function paintImage() {
  const [, height, width] = model.shape;
  paint(at("image"), width, height, pixelColor(unpack(model.pixels), model.shape));
}

const kernelCanvases = canvases(at("kernels"), model.kernels[0]);
function paintKernels(snapshot) {
  const [, channels, height, width] = model.kernels, values = unpack(snapshot.kernels), size = height * width;
  kernelCanvases.forEach((canvas, number) => {
    const start = number * channels * size;
    paint(canvas, width, height, (i) =>
      channels === 3 ? [0, 1, 2].map((c) => values[start + c * size + i]) : divergingColor(values[start + i] / 127.5 - 1),
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
function paintMaps(snapshot) {
  model.stages.forEach(({ shown }, s) => {
    const [, height, width] = shown, values = unpack(snapshot.maps[s]), size = height * width;
    stageCanvases[s].forEach((canvas, number) => paint(canvas, width, height, (i) => heatColor(values[number * size + i] / 255)));
  });
}

function paintMatrix(snapshot) {
  const count = classes.length;
  paint(at("matrix"), count, count, (i) => {
    const row = snapshot.confusion[Math.floor(i / count)], fraction = Math.sqrt(row[i % count] / Math.max(row.reduce((a, b) => a + b), 1));
    return [247, 250, 255].map((level, c) => level + ([8, 48, 107][c] - level) * fraction);
  });
}

// draw a line of values from 0 to 1, one for each snapshot
function line(values, kind) {
  const path = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  path.setAttribute("points", values.map((value, i) => `${i},${1 - value}`).join(" "));
  path.setAttribute("class", kind);
  at("curve").appendChild(path);
}

function drawCurve() {
  at("curve").setAttribute("viewBox", `0 0 ${Math.max(snapshots.length - 1, 1)} 1`);
  line(snapshots.map((m) => m.accuracy), "line");
  line(snapshots.map((m) => m.probabilities[last]), "line own");
  const now = document.createElementNS("http://www.w3.org/2000/svg", "line");
  now.id = "now";
  now.setAttribute("class", "now");
  now.setAttribute("y1", 0);
  now.setAttribute("y2", 1);
  at("curve").appendChild(now);
}

function show(number) {
  const snapshot = snapshots[number], { probabilities } = snapshot;
  at("when").textContent = `Epoch ${formatEpoch(snapshot.epoch)}: accuracy ${percent(snapshot.accuracy)}`;
  at("slider").setAttribute("aria-valuetext", `epoch ${formatEpoch(snapshot.epoch)}`);
  for (const end of ["x1", "x2"]) at("now").setAttribute(end, number);
  at("curve-text").textContent =
    `Solid: accuracy on ${model.images}, now ${percent(snapshot.accuracy)}. Dashed: probability of “${classes[last]}” for the image below. The first epoch is stretched, because most changes happen there.`;
  at("bars").replaceChildren(...shownClasses.map((i) => bar(classes[i], probabilities[i])));
  const best = probabilities.indexOf(Math.max(...probabilities));
  at("prediction").textContent = `${model.image}: “${classes[best]}”, ${percent(probabilities[best])}.`;
  paintKernels(snapshot);
  paintMaps(snapshot);
  if (snapshot.confusion) paintMatrix(snapshot);
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
  if (Number(slider.value) === snapshots.length - 1) slider.value = 0;
  show(Number(slider.value));
  at("play").textContent = "Pause";
  playing = setInterval(() => {
    slider.value = Number(slider.value) + 1;
    show(Number(slider.value));
    if (Number(slider.value) === snapshots.length - 1) stop();
  }, 300);
}

at("title").textContent = `Timelapse of ${model.name}`;
at("subtitle").textContent = `The model “${model.model}” on ${model.data}, from random weights to the end of its training, in ${snapshots.length} snapshots. Move the slider, or use the arrow keys.`;
at("kernels-text").textContent = model.kernels[1] === 3 ? "Each filter responds to a small pattern, shown in its colors." : "Each filter responds to a small pattern: light at red weights increases the response, light at blue weights decreases it.";
const named = classes.some((name) => name.length > 2);
at("bars").classList.toggle("bars-named", named);
at("matrix-predicted").classList.toggle("upright", named);
for (const place of ["matrix-true", "matrix-predicted"]) {
  // more names would overlap
  for (const name of classes.length <= MAX_BARS ? classes : []) at(place).appendChild(document.createElement("span")).textContent = name;
}
if (!snapshots[0].confusion) {
  at("matrix-grid").hidden = true;
  at("matrix-text").textContent = `The confusion matrix of ${classes.length} classes is too large to be shown here.`;
}
at("slider").max = snapshots.length - 1;
at("slider").value = snapshots.length - 1;
at("slider").addEventListener("input", () => {
  stop();
  show(Number(at("slider").value));
});
at("play").onclick = play;
drawCurve();
paintImage();
show(snapshots.length - 1);

// The page: a pad to draw on, pictures from anywhere, the answer as it changes, and what goes on inside.
"use strict";

const model = JSON.parse(at("model").textContent);
const net = new Net(model, at("weights").textContent);
const shape = model.preprocess;
const sizes = [shape.channels, shape.height, shape.width];
const drawn = shape.style.content_size > 0; // a net for what is drawn: digits, clothes on black
const digits = model.classes.every((name) => /^\d$/.test(name));
const pad = at("pad").getContext("2d", { willReadFrequently: true });
const SIDE = at("pad").width;
const MOST_MAPS = 32;

const list = (names) => (names.length < 2 ? names.join("") : `${names.slice(0, -1).join(", ")} and ${names.at(-1)}`);

// what the net says of its input

let waiting = 0;
function soon(imageData) {
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(() => show(adapt(imageData(), shape)));
}

function show(pixels) {
  const result = net.run(pixels);
  const order = result.probabilities.map((_, i) => i).sort((a, b) => result.probabilities[b] - result.probabilities[a]);
  const best = order[0], sure = result.probabilities[best];
  at("answer").textContent = result.known === false ? "I do not know this" : model.classes[best];
  at("answer").classList.toggle("unknown", result.known === false);
  at("words").textContent =
    result.known === false
      ? `This is unlike anything that the net learned from. If it had to choose: ${model.classes[best]}.`
      : sure > 0.95 ? "It is sure." : sure > 0.7 ? "It is fairly sure." : "It is not sure.";
  // a few classes keep their places, so that the bars do not jump; of many the likeliest are shown
  const shown = order.length > MOST_BARS ? order.slice(0, MOST_BARS) : [...model.classes.keys()];
  at("bars").replaceChildren(...shown.map((i) => bar(model.classes[i], result.probabilities[i])));
  paint(at("seen"), shape.width, shape.height, pixelColour(pixels, sizes));
  showHeat(pixels, result, best);
  showMaps(result);
}

function showHeat(pixels, result, label) {
  const [height, width, heat] = net.heat(result, label);
  const top = Math.max(...heat, 1e-6), colour = pixelColour(pixels, sizes);
  paint(at("heat"), shape.width, shape.height, (i) => {
    // between the places of the coarse map, bilinear
    const y = ((Math.floor(i / shape.width) + 0.5) / shape.height) * height - 0.5;
    const x = (((i % shape.width) + 0.5) / shape.width) * width - 0.5;
    let value = 0;
    for (const [py, wy] of between(y, height)) for (const [px, wx] of between(x, width)) value += wy * wx * heat[py * width + px];
    const grey = colour(i).reduce((a, b) => a + b) / 3;
    return glow(Math.max(value, 0) / top).map((c) => 0.72 * c + 0.28 * grey);
  });
}

function between(place, size) {
  const low = Math.floor(place), part = place - low, inside = (i) => Math.min(Math.max(i, 0), size - 1);
  return [[inside(low), 1 - part], [inside(low + 1), part]];
}

function showMaps(result) {
  model.steps.forEach(({ output, pooled }, number) => {
    const [channels, height, width] = result.values[output].shape, data = result.values[output].data, size = height * width;
    const shown = Math.min(channels, MOST_MAPS);
    let stage = at("stages").children[number];
    if (!stage) {
      stage = at("stages").appendChild(document.createElement("div"));
      stage.appendChild(document.createElement("h3")).textContent = pooled
        ? `Step ${number + 1}: shrunk to ${width} × ${height}`
        : `Step ${number + 1}: ${channels} maps of ${width} × ${height}`;
      const maps = stage.appendChild(document.createElement("div"));
      maps.className = "maps";
      maps.setAttribute("role", "img");
      maps.setAttribute("aria-label", `${shown} feature maps of step ${number + 1}`);
      for (let c = 0; c < shown; c++) maps.appendChild(document.createElement("canvas"));
      if (channels > shown) {
        const more = stage.appendChild(document.createElement("p"));
        more.className = "quiet";
        more.textContent = `... and ${channels - shown} more`;
      }
    }
    let top = 1e-6;
    for (let i = 0; i < shown * size; i++) top = Math.max(top, data[i]);
    Array.from(stage.querySelectorAll("canvas")).forEach((canvas, c) =>
      paint(canvas, width, height, (i) => glow(Math.sqrt(Math.max(data[c * size + i], 0) / top))),
    );
  });
}

// what is on the pad

const drawing = { on: false, x: 0, y: 0, keys: null };

function clear() {
  stopCamera();
  pad.fillStyle = "#fff";
  pad.fillRect(0, 0, SIDE, SIDE);
  drawing.photo = false;
  drawing.keys = null;
  look();
}

const look = () => soon(() => pad.getImageData(0, 0, SIDE, SIDE));

function stroke(x, y) {
  pad.strokeStyle = "#111";
  pad.lineWidth = SIDE / 13;
  pad.lineCap = pad.lineJoin = "round";
  pad.beginPath();
  pad.moveTo(drawing.x, drawing.y);
  pad.lineTo(x, y);
  pad.stroke();
  [drawing.x, drawing.y] = [x, y];
  look();
}

function place(event) {
  const box = at("pad").getBoundingClientRect();
  return [((event.clientX - box.left) / box.width) * SIDE, ((event.clientY - box.top) / box.height) * SIDE];
}

function useDrawing() {
  at("pad").addEventListener("pointerdown", (event) => {
    if (drawing.photo) clear();
    drawing.on = true;
    [drawing.x, drawing.y] = place(event);
    at("pad").setPointerCapture(event.pointerId);
    stroke(...place(event));
  });
  at("pad").addEventListener("pointermove", (event) => {
    if (drawing.on) for (const one of event.getCoalescedEvents?.() ?? [event]) stroke(...place(one));
  });
  for (const kind of ["pointerup", "pointercancel"]) at("pad").addEventListener(kind, () => (drawing.on = false));
  // arrows move the pen, the space bar puts it down and lifts it
  at("pad").addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!move && event.key !== " ") return;
    event.preventDefault();
    if (drawing.photo) clear();
    drawing.keys ??= { x: SIDE / 2, y: SIDE / 4, down: false };
    const pen = drawing.keys;
    if (!move) pen.down = !pen.down;
    [drawing.x, drawing.y] = [pen.x, pen.y];
    if (move) [pen.x, pen.y] = [0, 1].map((i) => Math.min(Math.max([pen.x, pen.y][i] + (move[i] * SIDE) / 20, 0), SIDE));
    if (pen.down) stroke(pen.x, pen.y);
    at("hint").textContent = `The pen is ${pen.down ? "down" : "up"}, ${Math.round((100 * pen.x) / SIDE)}% from the left, ${Math.round((100 * pen.y) / SIDE)}% from the top.`;
  });
}

// pictures from files, the clipboard, and the camera

function put(source, width, height) {
  pad.fillStyle = "#fff";
  pad.fillRect(0, 0, SIDE, SIDE);
  const scale = (drawn ? Math.min : Math.max)(SIDE / width, SIDE / height);
  pad.imageSmoothingQuality = "high";
  pad.drawImage(source, (SIDE - width * scale) / 2, (SIDE - height * scale) / 2, width * scale, height * scale);
  drawing.photo = true;
}

async function take(blob) {
  if (!blob) return;
  stopCamera();
  try {
    const bitmap = await createImageBitmap(blob);
    put(bitmap, bitmap.width, bitmap.height);
    // the net gets the picture itself, not what the pad shows of it
    const scale = Math.min(1, 1200 / Math.max(bitmap.width, bitmap.height));
    const canvas = new OffscreenCanvas(Math.max(1, Math.round(bitmap.width * scale)), Math.max(1, Math.round(bitmap.height * scale)));
    const context = canvas.getContext("2d");
    context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    soon(() => context.getImageData(0, 0, canvas.width, canvas.height));
  } catch {
    at("words").textContent = "This file is no picture that the browser can read.";
  }
}

let stream = null;
async function startCamera() {
  if (stream) {
    const video = at("video");
    put(video, video.videoWidth, video.videoHeight);
    stopCamera();
    return look();
  }
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch {
    at("hint").textContent = "The camera cannot be used here.";
    return;
  }
  at("video").srcObject = stream;
  await at("video").play();
  at("video").hidden = false;
  at("pad").hidden = true;
  at("camera").textContent = "Take the picture";
}

function stopCamera() {
  if (!stream) return;
  stream.getTracks().forEach((track) => track.stop());
  stream = null;
  at("video").hidden = true;
  at("pad").hidden = false;
  at("camera").textContent = "Camera";
}

function useFiles() {
  at("open").onclick = () => at("file").click();
  at("file").onchange = () => take(at("file").files[0]);
  at("clear").onclick = clear;
  at("camera").hidden = !navigator.mediaDevices?.getUserMedia;
  at("camera").onclick = startCamera;
  addEventListener("paste", (event) => take(Array.from(event.clipboardData.files)[0]));
  const frame = document.querySelector(".frame");
  addEventListener("dragover", (event) => {
    event.preventDefault();
    frame.classList.add("over");
  });
  addEventListener("dragleave", () => frame.classList.remove("over"));
  addEventListener("drop", (event) => {
    event.preventDefault();
    frame.classList.remove("over");
    take(event.dataTransfer.files[0]);
  });
}

function useSamples() {
  (model.samples ?? []).forEach(({ label, pixels }) => {
    const values = unpack(pixels);
    const button = at("samples").appendChild(document.createElement("button"));
    button.type = "button";
    button.setAttribute("aria-label", `Try a picture of: ${label}`);
    button.title = label;
    const canvas = button.appendChild(document.createElement("canvas"));
    paint(canvas, shape.width, shape.height, pixelColour(values, sizes));
    button.onclick = () => {
      stopCamera();
      pad.imageSmoothingEnabled = false;
      pad.drawImage(canvas, 0, 0, SIDE, SIDE);
      pad.imageSmoothingEnabled = true;
      drawing.photo = true;
      show(values);
    };
  });
}

// the page proves that it answers as the net does in PyTorch

function prove() {
  const { shape: sizes, images, probabilities, known } = model.golden;
  const [n, height, width, channels] = sizes, bytes = atob(images), size = height * width;
  let drift = 0, alike = true;
  for (let k = 0; k < n; k++) {
    const pixels = new Uint8Array(channels * size);
    for (let i = 0; i < size; i++)
      for (let c = 0; c < channels; c++) pixels[c * size + i] = bytes.charCodeAt((k * size + i) * channels + c);
    const result = net.run(pixels);
    result.probabilities.forEach((value, i) => (drift = Math.max(drift, Math.abs(value - probabilities[k][i]))));
    alike &&= !known || result.known === known[k];
  }
  const good = drift < 1e-3 && alike;
  at("proof").textContent = good
    ? "It has just checked itself: it answers as the original net does."
    : "Its self-check failed: in this browser it answers otherwise than the original net.";
  at("proof").dataset.drift = drift;
  at("proof").dataset.good = good;
}

function describe() {
  const { trained } = model, several = model.classes.length <= 12 ? list(model.classes) : `${model.classes.length} things`;
  const [low, high] = trained.accuracy_interval.map((share) => (100 * share).toFixed(1));
  at("title").textContent = digits ? "Draw a digit. A small net reads it." : `A small net that tells ${several}`;
  at("subtitle").textContent = `It learned from ${trained.images.toLocaleString("en")} pictures of ${trained.data}, and it shows here how it decides.`;
  at("bars").classList.toggle("bars-named", model.classes.some((name) => name.length > 2));
  at("ask").textContent = digits ? "Draw here" : "Show it something";
  at("hint").textContent = drawn ? "Draw with a finger or the mouse (keys: arrows and space), or drop or paste a picture." : "Drop or paste a picture, or open one.";
  at("seen-text").textContent = drawn ? `Cut out, shrunk to ${shape.width} × ${shape.height} points, light on black.` : `Shrunk to ${shape.width} × ${shape.height} points: all that it gets.`;
  at("facts").textContent = `Net “${trained.net}” with ${trained.parameters.toLocaleString("en")} numbers, trained by convlens on ${trained.data}. On ${trained.n.toLocaleString("en")} pictures that it had never seen it was right ${(100 * trained.accuracy).toFixed(2)}% of the time (95% interval ${low}% to ${high}%).`;
}

// a server has a page of each of its nets
function useOthers() {
  at("others").hidden = model.nets.length < 2;
  for (const name of model.nets) {
    const link = at("others").appendChild(document.createElement(name === model.here ? "strong" : "a"));
    link.textContent = name;
    if (name === model.here) link.setAttribute("aria-current", "page");
    else link.href = `?model=${encodeURIComponent(name)}`;
  }
  at("others").prepend("Nets here:");
}

// a first thing to look at: a digit is written, a photo net gets the first sample
function begin() {
  clear();
  if (digits) {
    const points = [[0.32, 0.24], [0.68, 0.24], [0.62, 0.42], [0.52, 0.58], [0.46, 0.8]].map((p) => p.map((v) => v * SIDE));
    [drawing.x, drawing.y] = points[0];
    points.slice(1).forEach((point) => stroke(...point));
    drawing.photo = true; // the first stroke of one's own clears it
  } else at("samples").querySelector("button")?.click();
}

describe();
useOthers();
useFiles();
useSamples();
if (drawn) useDrawing();
else at("pad").classList.add("still");
begin();
setTimeout(prove, 50);

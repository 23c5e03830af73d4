// The playground: draw or open an image, and see the prediction and the feature maps of the model.
"use strict";

const description = JSON.parse(at("model").textContent);
const model = new Model(description, at("weights").textContent);
const { classes, preprocess: shape, training } = description;
const sizes = [shape.channels, shape.height, shape.width];
const drawable = shape.style.content_size > 0; // the model takes strokes or shapes on black, as in MNIST
const digits = classes.every((name) => /^\d$/.test(name));
const pad = at("pad").getContext("2d", { willReadFrequently: true });
const SIDE = at("pad").width;
const MAX_MAPS = 32;

const list = (names) => (names.length < 2 ? names.join("") : `${names.slice(0, -1).join(", ")} and ${names.at(-1)}`);

// prediction

let pending = 0;
function schedule(imageData) {
  cancelAnimationFrame(pending);
  pending = requestAnimationFrame(() => show(adapt(imageData(), shape)));
}

function show(pixels) {
  const result = model.run(pixels);
  const order = result.probabilities.map((_, i) => i).sort((a, b) => result.probabilities[b] - result.probabilities[a]);
  const best = order[0], confidence = result.probabilities[best], unknown = result.inDistribution === false;
  at("answer").textContent = unknown ? "I do not know this" : classes[best];
  at("answer").classList.toggle("unknown", unknown);
  at("words").textContent =
    unknown
      ? `This is unlike the images that the model was trained on. The closest class: ${classes[best]}.`
      : confidence > 0.95 ? "It is sure." : confidence > 0.7 ? "It is fairly sure." : "It is not sure.";
  // few classes: keep their order, so that the bars do not jump; many classes: show the most probable ones
  const shown = order.length > MAX_BARS ? order.slice(0, MAX_BARS) : [...classes.keys()];
  at("bars").replaceChildren(...shown.map((i) => bar(classes[i], result.probabilities[i])));
  paint(at("input"), shape.width, shape.height, pixelColor(pixels, sizes));
  showHeatmap(pixels, result, best);
  showMaps(result);
}

function showHeatmap(pixels, result, label) {
  const [height, width, heatmap] = model.occlusionMap(result, label);
  const max = Math.max(...heatmap, 1e-6), color = pixelColor(pixels, sizes);
  paint(at("heatmap"), shape.width, shape.height, (i) => {
    // bilinear interpolation of the coarse map
    const y = ((Math.floor(i / shape.width) + 0.5) / shape.height) * height - 0.5;
    const x = (((i % shape.width) + 0.5) / shape.width) * width - 0.5;
    let value = 0;
    for (const [py, wy] of neighbors(y, height)) for (const [px, wx] of neighbors(x, width)) value += wy * wx * heatmap[py * width + px];
    const gray = color(i).reduce((a, b) => a + b) / 3;
    return heatColor(Math.max(value, 0) / max).map((c) => 0.72 * c + 0.28 * gray);
  });
}

function neighbors(position, size) {
  const low = Math.floor(position), part = position - low, inside = (i) => Math.min(Math.max(i, 0), size - 1);
  return [[inside(low), 1 - part], [inside(low + 1), part]];
}

function showMaps(result) {
  description.steps.forEach(({ output, pooled }, number) => {
    const [channels, height, width] = result.values[output].shape, data = result.values[output].data, size = height * width;
    const shown = Math.min(channels, MAX_MAPS);
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
    let max = 1e-6;
    for (let i = 0; i < shown * size; i++) max = Math.max(max, data[i]);
    Array.from(stage.querySelectorAll("canvas")).forEach((canvas, c) =>
      paint(canvas, width, height, (i) => heatColor(Math.sqrt(Math.max(data[c * size + i], 0) / max))),
    );
  });
}

// drawing

const drawing = { on: false, x: 0, y: 0, keys: null };

function clear() {
  stopCamera();
  pad.fillStyle = "#fff";
  pad.fillRect(0, 0, SIDE, SIDE);
  drawing.replaceable = false;
  drawing.keys = null;
  predictPad();
}

const predictPad = () => schedule(() => pad.getImageData(0, 0, SIDE, SIDE));

function stroke(x, y) {
  pad.strokeStyle = "#111";
  pad.lineWidth = SIDE / 13;
  pad.lineCap = pad.lineJoin = "round";
  pad.beginPath();
  pad.moveTo(drawing.x, drawing.y);
  pad.lineTo(x, y);
  pad.stroke();
  [drawing.x, drawing.y] = [x, y];
  predictPad();
}

function positionOf(event) {
  const box = at("pad").getBoundingClientRect();
  return [((event.clientX - box.left) / box.width) * SIDE, ((event.clientY - box.top) / box.height) * SIDE];
}

function initDrawing() {
  at("pad").addEventListener("pointerdown", (event) => {
    if (drawing.replaceable) clear();
    drawing.on = true;
    [drawing.x, drawing.y] = positionOf(event);
    at("pad").setPointerCapture(event.pointerId);
    stroke(...positionOf(event));
  });
  at("pad").addEventListener("pointermove", (event) => {
    if (drawing.on) for (const one of event.getCoalescedEvents?.() ?? [event]) stroke(...positionOf(one));
  });
  for (const kind of ["pointerup", "pointercancel"]) at("pad").addEventListener(kind, () => (drawing.on = false));
  // keyboard: arrows move the pen, the space bar lowers and lifts it
  at("pad").addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!move && event.key !== " ") return;
    event.preventDefault();
    if (drawing.replaceable) clear();
    drawing.keys ??= { x: SIDE / 2, y: SIDE / 4, down: false };
    const pen = drawing.keys;
    if (!move) pen.down = !pen.down;
    [drawing.x, drawing.y] = [pen.x, pen.y];
    if (move) [pen.x, pen.y] = [0, 1].map((i) => Math.min(Math.max([pen.x, pen.y][i] + (move[i] * SIDE) / 20, 0), SIDE));
    if (pen.down) stroke(pen.x, pen.y);
    at("hint").textContent = `The pen is ${pen.down ? "down" : "up"}, ${Math.round((100 * pen.x) / SIDE)}% from the left, ${Math.round((100 * pen.y) / SIDE)}% from the top.`;
  });
}

// images from files, the clipboard and the camera

function drawImage(source, width, height) {
  pad.fillStyle = "#fff";
  pad.fillRect(0, 0, SIDE, SIDE);
  const scale = (drawable ? Math.min : Math.max)(SIDE / width, SIDE / height);
  pad.imageSmoothingQuality = "high";
  pad.drawImage(source, (SIDE - width * scale) / 2, (SIDE - height * scale) / 2, width * scale, height * scale);
  drawing.replaceable = true;
}

async function openImage(blob) {
  if (!blob) return;
  stopCamera();
  try {
    const bitmap = await createImageBitmap(blob);
    drawImage(bitmap, bitmap.width, bitmap.height);
    // the model gets the image itself, not the pad, which shows it at another size
    const scale = Math.min(1, 1200 / Math.max(bitmap.width, bitmap.height));
    const canvas = new OffscreenCanvas(Math.max(1, Math.round(bitmap.width * scale)), Math.max(1, Math.round(bitmap.height * scale)));
    const context = canvas.getContext("2d");
    context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    schedule(() => context.getImageData(0, 0, canvas.width, canvas.height));
  } catch {
    at("words").textContent = "The browser cannot read this file as an image.";
  }
}

let stream = null;
async function startCamera() {
  if (stream) {
    const video = at("video");
    drawImage(video, video.videoWidth, video.videoHeight);
    stopCamera();
    return predictPad();
  }
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch {
    at("hint").textContent = "The camera is not available.";
    return;
  }
  at("video").srcObject = stream;
  await at("video").play();
  at("video").hidden = false;
  at("pad").hidden = true;
  at("camera").textContent = "Take a photo";
}

function stopCamera() {
  if (!stream) return;
  stream.getTracks().forEach((track) => track.stop());
  stream = null;
  at("video").hidden = true;
  at("pad").hidden = false;
  at("camera").textContent = "Camera";
}

function initFiles() {
  at("open").onclick = () => at("file").click();
  at("file").onchange = () => openImage(at("file").files[0]);
  at("clear").onclick = clear;
  at("camera").hidden = !navigator.mediaDevices?.getUserMedia;
  at("camera").onclick = startCamera;
  addEventListener("paste", (event) => openImage(Array.from(event.clipboardData.files)[0]));
  const frame = document.querySelector(".frame");
  addEventListener("dragover", (event) => {
    event.preventDefault();
    frame.classList.add("over");
  });
  addEventListener("dragleave", () => frame.classList.remove("over"));
  addEventListener("drop", (event) => {
    event.preventDefault();
    frame.classList.remove("over");
    openImage(event.dataTransfer.files[0]);
  });
}

function initSamples() {
  (description.samples ?? []).forEach(({ label, pixels }) => {
    const values = unpack(pixels);
    const button = at("samples").appendChild(document.createElement("button"));
    button.type = "button";
    button.setAttribute("aria-label", `Try an image of: ${label}`);
    button.title = label;
    const canvas = button.appendChild(document.createElement("canvas"));
    paint(canvas, shape.width, shape.height, pixelColor(values, sizes));
    button.onclick = () => {
      stopCamera();
      pad.imageSmoothingEnabled = false;
      pad.drawImage(canvas, 0, 0, SIDE, SIDE);
      pad.imageSmoothingEnabled = true;
      drawing.replaceable = true;
      show(values);
    };
  });
}

// self-check: compare the outputs for the reference images with those of PyTorch

function verify() {
  const { shape: [n, height, width, channels], images, probabilities, in_distribution: inDistribution } = description.reference;
  const bytes = atob(images), size = height * width;
  let error = 0, agrees = true;
  for (let k = 0; k < n; k++) {
    const pixels = new Uint8Array(channels * size);
    for (let i = 0; i < size; i++)
      for (let c = 0; c < channels; c++) pixels[c * size + i] = bytes.charCodeAt((k * size + i) * channels + c);
    const result = model.run(pixels);
    result.probabilities.forEach((value, i) => (error = Math.max(error, Math.abs(value - probabilities[k][i]))));
    agrees &&= !inDistribution || result.inDistribution === inDistribution[k];
  }
  const passed = error < 1e-3 && agrees;
  at("check").textContent = passed
    ? "Self-check passed: the page gives the same outputs as the original model."
    : "Self-check failed: in this browser the page gives other outputs than the original model.";
  at("check").dataset.error = error;
  at("check").dataset.passed = passed;
}

function describe() {
  const named = classes.length <= 12 ? list(classes) : `${classes.length} classes`;
  const [low, high] = training.accuracy_ci95.map((fraction) => (100 * fraction).toFixed(1));
  at("title").textContent = digits ? "Draw a digit. A small neural network reads it." : `A small neural network that recognizes ${named}`;
  at("subtitle").textContent = `It was trained on ${training.num_train_images.toLocaleString("en")} images of ${training.data}. This page shows how it decides.`;
  at("bars").classList.toggle("bars-named", classes.some((name) => name.length > 2));
  at("ask").textContent = digits ? "Draw here" : "Show it something";
  at("hint").textContent = drawable ? "Draw with a finger or the mouse (keys: arrows and space), or drop or paste an image." : "Drop, paste or open an image.";
  at("input-text").textContent = drawable ? `The input: cut out, ${shape.width} × ${shape.height} pixels, light on black.` : `The input: ${shape.width} × ${shape.height} pixels.`;
  at("facts").textContent = `Model “${training.model}” with ${training.parameters.toLocaleString("en")} parameters, trained with convlens on ${training.data}. Accuracy on ${training.num_images.toLocaleString("en")} test images: ${(100 * training.accuracy).toFixed(2)}% (95% interval ${low}% to ${high}%).`;
}

// a server has a page for each of its models
function initLinks() {
  at("others").hidden = description.models.length < 2;
  for (const name of description.models) {
    const link = at("others").appendChild(document.createElement(name === description.current ? "strong" : "a"));
    link.textContent = name;
    if (name === description.current) link.setAttribute("aria-current", "page");
    else link.href = `?model=${encodeURIComponent(name)}`;
  }
  at("others").prepend("Models:");
}

// the first image: a drawn seven for a model of digits, else the first sample
function showFirstImage() {
  clear();
  if (digits) {
    const points = [[0.32, 0.24], [0.68, 0.24], [0.62, 0.42], [0.52, 0.58], [0.46, 0.8]].map((p) => p.map((v) => v * SIDE));
    [drawing.x, drawing.y] = points[0];
    points.slice(1).forEach((point) => stroke(...point));
    drawing.replaceable = true; // the user's first stroke clears it
  } else at("samples").querySelector("button")?.click();
}

describe();
initLinks();
initFiles();
initSamples();
if (drawable) initDrawing();
else at("pad").classList.add("still");
showFirstImage();
setTimeout(verify, 50);

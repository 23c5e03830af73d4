// Preprocessing: turns any image into the model's input pixels, like Preprocess in Python.
"use strict";

// planes are {width, height, planes: [Uint8Array of width * height for each channel]}

function roundHalfEven(x) {
  const down = Math.floor(x);
  return x - down === 0.5 ? down + (down % 2) : Math.round(x);
}

// blend the pixels of a canvas onto white, in grayscale (ITU-R 601, as in Pillow) or RGB
function toPlanes({ width, height, data }, channels) {
  const planes = Array.from({ length: channels }, () => new Uint8Array(width * height));
  for (let i = 0; i < width * height; i++) {
    const alpha = data[4 * i + 3];
    const [r, g, b] = [0, 1, 2].map((c) => Math.round((data[4 * i + c] * alpha + 255 * (255 - alpha)) / 255));
    if (channels === 1) planes[0][i] = (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16;
    else [r, g, b].forEach((value, c) => (planes[c][i] = value));
  }
  return { width, height, planes };
}

const TRIANGLE = { support: 1, weight: (x) => Math.max(1 - Math.abs(x), 0) };
const BOX = { support: 0.5, weight: (x) => (x > -0.5 && x <= 0.5 ? 1 : 0) };

// for each of `to` output positions: the first source position and the weights from there on, as in Pillow's resize
function coefficients(size, from, until, to, filter) {
  const scale = (until - from) / to, stretch = Math.max(scale, 1), support = filter.support * stretch;
  return Array.from({ length: to }, (_, position) => {
    const center = from + (position + 0.5) * scale;
    const first = Math.max(Math.trunc(center - support + 0.5), 0);
    const last = Math.min(Math.trunc(center + support + 0.5), size);
    const weights = Array.from({ length: last - first }, (_, i) => filter.weight((i + first - center + 0.5) / stretch));
    const total = weights.reduce((a, b) => a + b, 0);
    return [first, weights.map((weight) => weight / total)];
  });
}

function resize({ width, height, planes }, toWidth, toHeight, filter, box = [0, 0, width, height]) {
  const across = coefficients(width, box[0], box[2], toWidth, filter);
  const down = coefficients(height, box[1], box[3], toHeight, filter);
  const round = (x) => Math.min(Math.max(Math.floor(x + 0.5), 0), 255);
  const resized = planes.map((plane) => {
    const rows = new Uint8Array(toWidth * height);
    for (let y = 0; y < height; y++)
      across.forEach(([first, weights], x) => {
        rows[y * toWidth + x] = round(weights.reduce((sum, w, i) => sum + w * plane[y * width + first + i], 0));
      });
    const out = new Uint8Array(toWidth * toHeight);
    down.forEach(([first, weights], y) => {
      for (let x = 0; x < toWidth; x++)
        out[y * toWidth + x] = round(weights.reduce((sum, w, i) => sum + w * rows[(first + i) * toWidth + x], 0));
    });
    return out;
  });
  return { width: toWidth, height: toHeight, planes: resized };
}

// center crop to the aspect ratio of width x height, then resize
function fitPhoto(image, width, height) {
  const wide = Math.min((width / height) * image.height, image.width);
  const tall = Math.min((height / width) * image.width, image.height);
  const left = (image.width - wide) / 2, top = (image.height - tall) / 2;
  return resize(image, width, height, TRIANGLE, [left, top, left + wide, top + tall]);
}

function median(values) {
  const sorted = Float64Array.from(values).sort(), half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}

// least squares fit of brightness = a + b y + c x
function fitPlane(points) {
  const a = [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]];
  for (const [value, y, x] of points)
    [1, y, x].forEach((p, i) => [1, y, x, value].forEach((q, j) => (a[i][j] += p * q)));
  for (let i = 0; i < 3; i++) {
    for (let k = i + 1; k < 3; k++) if (Math.abs(a[k][i]) > Math.abs(a[i][i])) [a[i], a[k]] = [a[k], a[i]];
    for (let k = 0; k < 3; k++) {
      if (k === i || !a[i][i]) continue;
      const factor = a[k][i] / a[i][i];
      for (let j = i; j < 4; j++) a[k][j] -= factor * a[i][j];
    }
  }
  return [0, 1, 2].map((i) => (a[i][i] ? a[i][3] / a[i][i] : 0));
}

// the brightness of the paper at each position: a plane fitted to the border, because light often falls from one side
function estimatePaper(values, width, height) {
  const points = [];
  for (const y of [0, height - 1]) for (let x = 0; x < width; x++) points.push([values[y * width + x], y / height, x / width]);
  for (const x of [0, width - 1]) for (let y = 0; y < height; y++) points.push([values[y * width + x], y / height, x / width]);
  const middle = median(points.map(([value]) => value));
  let kept = points.filter(([value]) => Math.abs(value - middle) < 96), plane = [0, 0, 0];
  for (let turn = 0; turn < 2; turn++) {
    plane = fitPlane(kept);
    const distances = points.map(([value, y, x]) => Math.abs(value - plane[0] - plane[1] * y - plane[2] * x));
    const limit = Math.max(3 * median(distances), 4);
    kept = points.filter((_, i) => distances[i] <= limit);
  }
  return values.map((_, i) => plane[0] + plane[1] * (Math.floor(i / width) / height) + plane[2] * ((i % width) / width));
}

// strokes on paper (or light on dark) in the style of MNIST: light on black, scaled to a box and centered
function fitStrokes(image, width, height, { content_size: box, center_of_mass: byMass }) {
  const values = Float32Array.from(image.planes[0]);
  const paper = estimatePaper(values, image.width, image.height);
  const brightness = median(paper);
  if (image.width === width && image.height === height && brightness < 64) return image;
  let ink = values.map((value, i) => (brightness > 127 ? paper[i] - value : value - paper[i]));
  const page = { width, height, planes: [new Uint8Array(width * height)] };
  const rank = Math.min(Math.floor(ink.length / 40) + 1, 20);
  const peak = Float32Array.from(ink).sort()[ink.length - rank];
  if (peak < 16) return page; // no strokes: an empty page
  ink = ink.map((value) => Math.min(Math.max(value / peak, 0), 1)).map((value) => (value < 0.25 ? 0 : value));
  const rows = [], columns = [];
  ink.forEach((value, i) => {
    if (!value) return;
    rows.push(Math.floor(i / image.width));
    columns.push(i % image.width);
  });
  const min = (list) => list.reduce((a, b) => Math.min(a, b)), max = (list) => list.reduce((a, b) => Math.max(a, b));
  const top = min(rows), left = min(columns), tall = max(rows) - top + 1, wide = max(columns) - left + 1;
  const cut = new Uint8Array(wide * tall);
  for (let y = 0; y < tall; y++)
    for (let x = 0; x < wide; x++) cut[y * wide + x] = Math.floor(ink[(top + y) * image.width + left + x] * 255);
  const scale = box / Math.max(tall, wide);
  const toWide = Math.max(roundHalfEven(wide * scale), 1), toTall = Math.max(roundHalfEven(tall * scale), 1);
  const small = resize({ width: wide, height: tall, planes: [cut] }, toWide, toTall, BOX).planes[0];
  const strongest = Math.max(max(small), 1);
  const pixels = Float32Array.from(small, (value) => value * (255 / strongest)); // thin strokes fade when they are shrunk
  let y = (toTall - 1) / 2, x = (toWide - 1) / 2;
  if (byMass) {
    const total = pixels.reduce((a, b) => a + b, 0);
    y = pixels.reduce((sum, value, i) => sum + value * Math.floor(i / toWide), 0) / total;
    x = pixels.reduce((sum, value, i) => sum + value * (i % toWide), 0) / total;
  }
  const placeY = Math.min(Math.max(roundHalfEven((height - 1) / 2 - y), 0), height - toTall);
  const placeX = Math.min(Math.max(roundHalfEven((width - 1) / 2 - x), 0), width - toWide);
  pixels.forEach((value, i) => {
    page.planes[0][(placeY + Math.floor(i / toWide)) * width + placeX + (i % toWide)] = Math.floor(value);
  });
  return page;
}

// from the pixels of a canvas to the model's input, Uint8Array (C, H, W)
function adapt(imageData, { channels, height, width, style }) {
  const image = toPlanes(imageData, channels);
  const fitted = style.content_size ? fitStrokes(image, width, height, style) : fitPhoto(image, width, height);
  const pixels = new Uint8Array(channels * height * width);
  fitted.planes.forEach((plane, c) => pixels.set(plane, c * height * width));
  return pixels;
}

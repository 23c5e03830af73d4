// Drawing helpers shared by all pages: colormaps, small canvases, bars.
"use strict";

const MAX_BARS = 10;
const at = (id) => document.getElementById(id);
const unpack = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

const percent = (fraction) => (fraction > 0.9995 ? "> 99.9%" : fraction < 0.0005 ? "< 0.1%" : `${(100 * fraction).toFixed(1)}%`);

// colormap of heatmaps, from 0 to 1: black, violet, red, yellow
function heatColor(value) {
  const stops = [[10, 12, 28], [62, 26, 120], [200, 50, 90], [252, 160, 60], [255, 244, 190]];
  const position = Math.min(Math.max(value, 0), 0.9999) * (stops.length - 1), i = Math.floor(position), part = position - i;
  return stops[i].map((from, c) => from + (stops[i + 1][c] - from) * part);
}

// paint a canvas pixel by pixel; color(i) returns [r, g, b]
function paint(canvas, width, height, color) {
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d"), image = context.createImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    const [r, g, b] = color(i);
    image.data.set([r, g, b, 255], 4 * i);
  }
  context.putImageData(image, 0, 0);
}

// return the color function of an image (C, H, W) with values 0 to 255
function pixelColor(pixels, [channels, height, width]) {
  const size = height * width;
  return (i) => (channels === 3 ? [pixels[i], pixels[size + i], pixels[2 * size + i]] : Array(3).fill(pixels[i]));
}

function bar(name, fraction) {
  const row = document.createElement("div");
  row.className = "bar";
  const [label, track, number] = ["span", "div", "span"].map((kind) => row.appendChild(document.createElement(kind)));
  label.textContent = name;
  track.className = "track";
  track.appendChild(document.createElement("div")).className = "fill";
  track.firstChild.style.width = `${100 * fraction}%`;
  number.textContent = percent(fraction);
  return row;
}

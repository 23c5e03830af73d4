// What every page of convlens paints with: colours, small canvases, bars.
"use strict";

const MOST_BARS = 10;
const at = (id) => document.getElementById(id);
const unpack = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

const percent = (share) => (share > 0.9995 ? "> 99.9%" : share < 0.0005 ? "< 0.1%" : `${(100 * share).toFixed(1)}%`);

// colours of a heat map, from 0 to 1: black, violet, red, yellow
function glow(value) {
  const stops = [[10, 12, 28], [62, 26, 120], [200, 50, 90], [252, 160, 60], [255, 244, 190]];
  const place = Math.min(Math.max(value, 0), 0.9999) * (stops.length - 1), i = Math.floor(place), part = place - i;
  return stops[i].map((from, c) => from + (stops[i + 1][c] - from) * part);
}

// paint values of 0 to 1 on a canvas, one pixel each
function paint(canvas, width, height, colour) {
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d"), image = context.createImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    const [r, g, b] = colour(i);
    image.data.set([r, g, b, 255], 4 * i);
  }
  context.putImageData(image, 0, 0);
}

// the colour of each pixel of an image of 0 to 255, channel by channel: (channels, height, width)
function pixelColour(pixels, [channels, height, width]) {
  const size = height * width;
  return (i) => (channels === 3 ? [pixels[i], pixels[size + i], pixels[2 * size + i]] : Array(3).fill(pixels[i]));
}

function bar(name, share) {
  const row = document.createElement("div");
  row.className = "bar";
  const [label, track, number] = ["span", "div", "span"].map((kind) => row.appendChild(document.createElement(kind)));
  label.textContent = name;
  track.className = "track";
  track.appendChild(document.createElement("div")).className = "fill";
  track.firstChild.style.width = `${100 * share}%`;
  number.textContent = percent(share);
  return row;
}

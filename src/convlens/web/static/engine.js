// The net in the browser: a list of layers as Python wrote it, run on one image at a time, channel by channel.
"use strict";

const GELU_A = [0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429];

// Abramowitz and Stegun 7.1.26: off by less than 2e-7
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const series = t * (GELU_A[0] + t * (GELU_A[1] + t * (GELU_A[2] + t * (GELU_A[3] + t * GELU_A[4]))));
  return Math.sign(x) * (1 - series * Math.exp(-x * x));
}

function softmax(values) {
  const top = Math.max(...values);
  const powers = Array.from(values, (value) => Math.exp(value - top));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / sum);
}

function logSumExp(values) {
  const top = Math.max(...values);
  return top + Math.log(values.reduce((sum, value) => sum + Math.exp(value - top), 0));
}

// a tensor is {data: Float32Array, shape: [C, H, W] or [D]}
function tensor(shape, data) {
  return { shape, data: data || new Float32Array(shape.reduce((a, b) => a * b, 1)) };
}

function map(x, f) {
  return tensor(x.shape, x.data.map(f));
}

function withBorder(x, [top, left, bottom, right]) {
  if (!(top || left || bottom || right)) return x;
  const [channels, height, width] = x.shape;
  const out = tensor([channels, height + top + bottom, width + left + right]);
  const [, h, w] = out.shape;
  for (let c = 0; c < channels; c++)
    for (let y = 0; y < height; y++) {
      const from = (c * height + y) * width;
      out.data.set(x.data.subarray(from, from + width), (c * h + y + top) * w + left);
    }
  return out;
}

function conv(x, weight, bias, { pads, strides }) {
  const [outputs, inputs, kh, kw] = weight.shape;
  const padded = withBorder(x, pads);
  const [, h, w] = padded.shape;
  const [sy, sx] = strides;
  const height = Math.floor((h - kh) / sy) + 1;
  const width = Math.floor((w - kw) / sx) + 1;
  const out = tensor([outputs, height, width]);
  const source = padded.data, weights = weight.data, target = out.data;
  for (let o = 0; o < outputs; o++) {
    const base = o * height * width;
    if (bias) target.fill(bias.data[o], base, base + height * width);
    for (let i = 0; i < inputs; i++)
      for (let ky = 0; ky < kh; ky++)
        for (let kx = 0; kx < kw; kx++) {
          const factor = weights[((o * inputs + i) * kh + ky) * kw + kx];
          for (let y = 0; y < height; y++) {
            let to = base + y * width;
            let from = (i * h + y * sy + ky) * w + kx;
            for (let x = 0; x < width; x++, to++, from += sx) target[to] += factor * source[from];
          }
        }
  }
  return out;
}

function pool(x, { kernel, strides, pads }, start, add, end) {
  const [channels, h, w] = x.shape;
  const [kh, kw] = kernel, [sy, sx] = strides, [top, left, bottom, right] = pads;
  const height = Math.floor((h + top + bottom - kh) / sy) + 1;
  const width = Math.floor((w + left + right - kw) / sx) + 1;
  const out = tensor([channels, height, width]);
  for (let c = 0, to = 0; c < channels; c++)
    for (let y = 0; y < height; y++)
      for (let x0 = 0; x0 < width; x0++, to++) {
        let value = start, count = 0;
        for (let ky = Math.max(y * sy - top, 0); ky < Math.min(y * sy - top + kh, h); ky++)
          for (let kx = Math.max(x0 * sx - left, 0); kx < Math.min(x0 * sx - left + kw, w); kx++, count++)
            value = add(value, x.data[(c * h + ky) * w + kx]);
        out.data[to] = end(value, count);
      }
  return out;
}

function overSpace(x, start, add, end) {
  const [channels, h, w] = x.shape;
  return pool(x, { kernel: [h, w], strides: [1, 1], pads: [0, 0, 0, 0] }, start, add, end).data.slice(0, channels);
}

const sum = (a, b) => a + b;
const mean = (value, count) => value / count;
const same = (value) => value;

const LAYERS = {
  Conv: ([x, weight, bias], layer) => conv(x, weight, bias, layer),
  Affine: ([x, factor, offset]) => {
    const size = x.shape[1] * x.shape[2] || 1;
    return tensor(x.shape, x.data.map((v, i) => v * factor.data[Math.floor(i / size)] + offset.data[Math.floor(i / size)]));
  },
  Add: ([x, y]) => tensor(x.shape, x.data.map((v, i) => v + y.data[i])),
  Relu: ([x]) => map(x, (v) => Math.max(v, 0)),
  Gelu: ([x]) => map(x, (v) => (v * (1 + erf(v / Math.SQRT2))) / 2),
  MaxPool: ([x], layer) => pool(x, layer, -Infinity, Math.max, same),
  AveragePool: ([x], layer) => pool(x, layer, 0, sum, mean),
  ReduceMax: ([x]) => tensor([x.shape[0]], overSpace(x, -Infinity, Math.max, same)),
  ReduceMean: ([x]) => tensor([x.shape[0]], overSpace(x, 0, sum, mean)),
  Reshape: ([x]) => tensor([x.data.length], x.data),
  Gemm: ([x, weight, bias]) => {
    const [outputs, inputs] = weight.shape;
    const out = tensor([outputs]);
    for (let o = 0; o < outputs; o++) {
      let value = bias ? bias.data[o] : 0;
      for (let i = 0; i < inputs; i++) value += x.data[i] * weight.data[o * inputs + i];
      out.data[o] = value;
    }
    return out;
  },
  LogSoftmax: ([x]) => {
    const total = logSumExp(Array.from(x.data));
    return map(x, (v) => v - total);
  },
};

class Net {
  // model: what Python wrote; weights: all large tensors as 16-bit numbers in base64, each row with a scale of its own
  constructor(model, weights) {
    this.model = model;
    const bytes = Uint8Array.from(atob(weights), (letter) => letter.charCodeAt(0));
    const numbers = new Int16Array(bytes.buffer);
    this.tensors = {};
    for (const [name, { shape, values, at, scales }] of Object.entries(model.tensors)) {
      if (values) {
        this.tensors[name] = tensor(shape, Float32Array.from(values));
        continue;
      }
      const made = tensor(shape), row = made.data.length / scales.length;
      made.data.forEach((_, i) => (made.data[i] = numbers[at + i] * scales[Math.floor(i / row)]));
      this.tensors[name] = made;
    }
  }

  // run the layers from number `first` on; `values` has what came before, by name
  layers(values, first = 0) {
    for (const layer of this.model.layers.slice(first))
      values[layer.output] = LAYERS[layer.op](layer.inputs.map((name) => values[name] || this.tensors[name]), layer);
    return values;
  }

  // pixels: Uint8Array, one channel after the other
  run(pixels) {
    const { channels, height, width, mean: means, std } = this.model.preprocess;
    const size = height * width;
    const x = tensor([channels, height, width]);
    pixels.forEach((v, i) => (x.data[i] = (v / 255 - means[Math.floor(i / size)]) / std[Math.floor(i / size)]));
    const values = this.layers({ net_input: x });
    const logits = Array.from(values.logits.data);
    const probabilities = softmax(logits.map((v) => v / this.model.temperature));
    return { values, logits, probabilities, known: this.knows(logits, values.features.data) };
  }

  // see Trust.strangeness in Python; null where the model cannot say
  knows(logits, features) {
    const trust = this.model.trust;
    if (!trust) return null;
    const whitener = this.tensors.whitener, centres = this.tensors.centres;
    const [inputs, outputs] = whitener.shape, [classes] = centres.shape;
    const white = new Float64Array(outputs);
    for (let i = 0; i < inputs; i++)
      for (let o = 0; o < outputs; o++) white[o] += features[i] * whitener.data[i * outputs + o];
    let nearest = Infinity;
    for (let k = 0; k < classes; k++) {
      let square = 0;
      for (let o = 0; o < outputs; o++) square += (white[o] - centres.data[k * outputs + o]) ** 2;
      nearest = Math.min(nearest, Math.sqrt(square));
    }
    const [far, farSpread] = trust.distance, [high, highSpread] = trust.energy;
    return (nearest - far) / farSpread + (-logSumExp(logits) - high) / highSpread <= trust.threshold;
  }

  // how much the logit of `label` owes to each place of the last map: [height, width, Float32Array]
  heat(result, label) {
    const first = this.model.layers.findIndex((layer) => layer.output === this.model.last_map) + 1;
    const whole = result.values[this.model.last_map];
    const [channels, height, width] = whole.shape;
    const heat = new Float32Array(height * width);
    for (let place = 0; place < height * width; place++) {
      const without = tensor(whole.shape, whole.data.slice());
      for (let c = 0; c < channels; c++) without.data[c * height * width + place] = 0;
      const values = this.layers({ ...result.values, [this.model.last_map]: without }, first);
      heat[place] = result.logits[label] - values.logits.data[label];
    }
    return [height, width, heat];
  }
}

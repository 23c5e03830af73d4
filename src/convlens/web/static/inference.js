// Runs a model in the browser, one image at a time. export/html.py describes its layers.
"use strict";

const ERF_COEFFICIENTS = [0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429];

// Abramowitz and Stegun 7.1.26: the error is below 2e-7
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const series = t * (ERF_COEFFICIENTS[0] + t * (ERF_COEFFICIENTS[1] + t * (ERF_COEFFICIENTS[2] + t * (ERF_COEFFICIENTS[3] + t * ERF_COEFFICIENTS[4]))));
  return Math.sign(x) * (1 - series * Math.exp(-x * x));
}

function softmax(values) {
  const max = Math.max(...values);
  const exponentials = Array.from(values, (value) => Math.exp(value - max));
  const sum = exponentials.reduce((a, b) => a + b, 0);
  return exponentials.map((value) => value / sum);
}

function logSumExp(values) {
  const max = Math.max(...values);
  return max + Math.log(values.reduce((sum, value) => sum + Math.exp(value - max), 0));
}

// a tensor is {data: Float32Array, shape: [C, H, W] or [D]}
function tensor(shape, data) {
  return { shape, data: data || new Float32Array(shape.reduce((a, b) => a * b, 1)) };
}

function map(x, f) {
  return tensor(x.shape, x.data.map(f));
}

function zeroPad(x, [top, left, bottom, right]) {
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
  const padded = zeroPad(x, pads);
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

function pool(x, { kernel, strides, pads }, initial, reduce, finish) {
  const [channels, h, w] = x.shape;
  const [kh, kw] = kernel, [sy, sx] = strides, [top, left, bottom, right] = pads;
  const height = Math.floor((h + top + bottom - kh) / sy) + 1;
  const width = Math.floor((w + left + right - kw) / sx) + 1;
  const out = tensor([channels, height, width]);
  for (let c = 0, to = 0; c < channels; c++)
    for (let y = 0; y < height; y++)
      for (let x0 = 0; x0 < width; x0++, to++) {
        let value = initial, count = 0;
        for (let ky = Math.max(y * sy - top, 0); ky < Math.min(y * sy - top + kh, h); ky++)
          for (let kx = Math.max(x0 * sx - left, 0); kx < Math.min(x0 * sx - left + kw, w); kx++, count++)
            value = reduce(value, x.data[(c * h + ky) * w + kx]);
        out.data[to] = finish(value, count);
      }
  return out;
}

function globalPool(x, initial, reduce, finish) {
  const [channels, h, w] = x.shape;
  return pool(x, { kernel: [h, w], strides: [1, 1], pads: [0, 0, 0, 0] }, initial, reduce, finish).data.slice(0, channels);
}

const sum = (a, b) => a + b;
const mean = (value, count) => value / count;
const identity = (value) => value;

const LAYERS = {
  Conv: ([x, weight, bias], layer) => conv(x, weight, bias, layer),
  Affine: ([x, factor, offset]) => {
    const size = x.shape[1] * x.shape[2] || 1;
    return tensor(x.shape, x.data.map((v, i) => v * factor.data[Math.floor(i / size)] + offset.data[Math.floor(i / size)]));
  },
  Add: ([x, y]) => tensor(x.shape, x.data.map((v, i) => v + y.data[i])),
  Relu: ([x]) => map(x, (v) => Math.max(v, 0)),
  Gelu: ([x]) => map(x, (v) => (v * (1 + erf(v / Math.SQRT2))) / 2),
  MaxPool: ([x], layer) => pool(x, layer, -Infinity, Math.max, identity),
  AveragePool: ([x], layer) => pool(x, layer, 0, sum, mean),
  ReduceMax: ([x]) => tensor([x.shape[0]], globalPool(x, -Infinity, Math.max, identity)),
  ReduceMean: ([x]) => tensor([x.shape[0]], globalPool(x, 0, sum, mean)),
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

class Model {
  // description: see describe_model in export/html.py; weights: the large tensors as 16-bit integers in base64, with one
  // scale per row
  constructor(description, weights) {
    this.description = description;
    const bytes = Uint8Array.from(atob(weights), (letter) => letter.charCodeAt(0));
    const integers = new Int16Array(bytes.buffer);
    this.tensors = {};
    for (const [name, { shape, values, offset, scales }] of Object.entries(description.tensors)) {
      if (values) {
        this.tensors[name] = tensor(shape, Float32Array.from(values));
        continue;
      }
      const large = tensor(shape), row = large.data.length / scales.length;
      large.data.forEach((_, i) => (large.data[i] = integers[offset + i] * scales[Math.floor(i / row)]));
      this.tensors[name] = large;
    }
  }

  // run the layers from index `first` on; `values` holds the outputs of earlier layers by name
  runLayers(values, first = 0) {
    for (const layer of this.description.layers.slice(first))
      values[layer.output] = LAYERS[layer.op](layer.inputs.map((name) => values[name] || this.tensors[name]), layer);
    return values;
  }

  // pixels: Uint8Array (C, H, W)
  run(pixels) {
    const { channels, height, width, mean: means, std } = this.description.preprocess;
    const size = height * width;
    const x = tensor([channels, height, width]);
    pixels.forEach((v, i) => (x.data[i] = (v / 255 - means[Math.floor(i / size)]) / std[Math.floor(i / size)]));
    const values = this.runLayers({ model_input: x });
    const logits = Array.from(values.logits.data);
    const probabilities = softmax(logits.map((v) => v / this.description.temperature));
    return { values, logits, probabilities, inDistribution: this.isInDistribution(logits, values.features.data) };
  }

  // see UncertaintyModel.ood_score in Python; null if the model has no detector
  isInDistribution(logits, features) {
    const { uncertainty } = this.description;
    if (!uncertainty) return null;
    const { whitener, centers } = this.tensors;
    const [inputs, outputs] = whitener.shape, [classes] = centers.shape;
    const white = new Float64Array(outputs);
    for (let i = 0; i < inputs; i++)
      for (let o = 0; o < outputs; o++) white[o] += features[i] * whitener.data[i * outputs + o];
    let nearest = Infinity;
    for (let k = 0; k < classes; k++) {
      let square = 0;
      for (let o = 0; o < outputs; o++) square += (white[o] - centers.data[k * outputs + o]) ** 2;
      nearest = Math.min(nearest, Math.sqrt(square));
    }
    const [distanceMean, distanceStd] = uncertainty.distance, [energyMean, energyStd] = uncertainty.energy;
    const score = (nearest - distanceMean) / distanceStd + (-logSumExp(logits) - energyMean) / energyStd;
    return score <= uncertainty.ood_threshold;
  }

  // occlusion map in the last feature maps: by how much the logit of `label` falls without each position;
  // [height, width, Float32Array]
  occlusionMap(result, label) {
    const { layers, last_map: lastMap } = this.description;
    const first = layers.findIndex((layer) => layer.output === lastMap) + 1;
    const maps = result.values[lastMap];
    const [channels, height, width] = maps.shape;
    const heatmap = new Float32Array(height * width);
    for (let position = 0; position < height * width; position++) {
      const occluded = tensor(maps.shape, maps.data.slice());
      for (let c = 0; c < channels; c++) occluded.data[c * height * width + position] = 0;
      const values = this.runLayers({ ...result.values, [lastMap]: occluded }, first);
      heatmap[position] = result.logits[label] - values.logits.data[label];
    }
    return [height, width, heatmap];
  }
}

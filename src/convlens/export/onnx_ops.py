"""The parts of the exported ONNX graph around the model: preprocessing and outputs."""

from __future__ import annotations

# from uint8 images of any size, grayscale or RGB, to the model's input: center crop to its aspect ratio, then resize
PREPROCESS_GRAPH = """
preprocess (uint8[N, H, W, C] images) => (float[N, c, h, w] model_input)
<int64[2] size = {{{height}, {width}}}, int64[2] swapped_size = {{{width}, {height}}}, int64[2] swapped = {{1, 0}},
 int64[2] spatial_axes = {{1, 2}}, int64 one = {{1}}, int64 two = {{2}},
 {constants}, float min_level = {{0}}, float max_level = {{255}}>
{{
    shape = Shape<start = 1, end = 3>(images)
    swapped_shape = Gather(shape, swapped)
    scaled_shape = Mul(swapped_shape, size)
    half_size = Div(swapped_size, two)
    raised_shape = Add(scaled_shape, half_size)
    fitting = Div(raised_shape, swapped_size)
    fitting_positive = Max(fitting, one)
    crop = Min(shape, fitting_positive)
    margin = Sub(shape, crop)
    begin = Div(margin, two)
    end = Add(begin, crop)
    cropped = Slice(images, begin, end, spatial_axes)
    levels = Cast<to = 1>(cropped)
    {color}
    planes = Transpose<perm = [0, 3, 1, 2]>(colored)
    outer_shape = Shape<start = 0, end = 2>(planes)
    sizes = Concat<axis = 0>(outer_shape, size)
    resized = Resize<mode = "linear", antialias = 1>(planes, , , sizes)
    rounded = Round(resized)
    pixels = Clip(rounded, min_level, max_level)
    scaled = Mul(pixels, scale)
    model_input = Add(scaled, offset)
}}
"""

# by number of channels: constants, nodes. Gray is ITU-R 601 in integers, as in Pillow
COLOR_GRAPHS = {
    1: (
        "int64[1] last_axis = {-1}, float[3] luma = {19595, 38470, 7471}, float half = {32768}, float whole = {65536}",
        """weighted = Mul(levels, luma)
    weighted_sum = ReduceSum<keepdims = 1>(weighted, last_axis)
    raised = Add(weighted_sum, half)
    divided = Div(raised, whole)
    colored = Floor(divided)""",
    ),
    3: ("float[3] ones = {1, 1, 1}", "colored = Mul(levels, ones)"),  # broadcasts one channel to three
}

# from logits and features to the outputs
OUTPUT_GRAPH = """
output (float[N, K] logits, float[N, D] features) => (float[N, K] probabilities, int64[N] label)
<float temperature = {{{temperature!r}}}>
{{
    calibrated = Div(logits, temperature)
    probabilities = Softmax<axis = -1>(calibrated)
    label = ArgMax<axis = -1, keepdims = 0>(calibrated)
}}
"""

# see UncertaintyModel.ood_score
OOD_GRAPH = """
ood (float[N, K] logits, float[N, D] features) => (bool[N] in_distribution)
<int64[1] class_axis = {{1}}, int64[1] feature_axis = {{-1}}, float ood_threshold = {{{threshold!r}}},
 float distance_mean = {{{distance[0]!r}}}, float distance_std = {{{distance[1]!r}}},
 float energy_mean = {{{energy[0]!r}}}, float energy_std = {{{energy[1]!r}}}>
{{
    white = MatMul(features, whitener)
    centers = MatMul(means, whitener)
    expanded = Unsqueeze(white, class_axis)
    differences = Sub(expanded, centers)
    distances = ReduceL2<keepdims = 0>(differences, feature_axis)
    nearest = ReduceMin<keepdims = 0>(distances, feature_axis)
    distance_offset = Sub(nearest, distance_mean)
    distance_score = Div(distance_offset, distance_std)
    log_sum = ReduceLogSumExp<keepdims = 0>(logits, feature_axis)
    energy = Neg(log_sum)
    energy_offset = Sub(energy, energy_mean)
    energy_score = Div(energy_offset, energy_std)
    ood_score = Add(distance_score, energy_score)
    in_distribution = LessOrEqual(ood_score, ood_threshold)
}}
"""

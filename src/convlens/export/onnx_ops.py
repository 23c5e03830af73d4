"""The parts of the exported ONNX graph around the model: preprocessing and outputs."""

from __future__ import annotations

# from uint8 images of any size, grey or RGB, to what the net takes: cut at the middle to its proportions, then resized
PREPROCESS_GRAPH = """
front (uint8[N, H, W, C] images) => (float[N, c, h, w] net_input)
<int64[2] size = {{{height}, {width}}}, int64[2] other_size = {{{width}, {height}}}, int64[2] swapped = {{1, 0}},
 int64[2] inner = {{1, 2}}, int64 one = {{1}}, int64 two = {{2}},
 {constants}, float least = {{0}}, float most = {{255}}>
{{
    shape = Shape<start = 1, end = 3>(images)
    other = Gather(shape, swapped)
    wide = Mul(other, size)
    half_wide = Div(other_size, two)
    raised_wide = Add(wide, half_wide)
    fitting = Div(raised_wide, other_size)
    fitting_some = Max(fitting, one)
    kept = Min(shape, fitting_some)
    over = Sub(shape, kept)
    begin = Div(over, two)
    end = Add(begin, kept)
    middle = Slice(images, begin, end, inner)
    levels = Cast<to = 1>(middle)
    {colour}
    planes = Transpose<perm = [0, 3, 1, 2]>(coloured)
    outer = Shape<start = 0, end = 2>(planes)
    sizes = Concat<axis = 0>(outer, size)
    resized = Resize<mode = "linear", antialias = 1>(planes, , , sizes)
    rounded = Round(resized)
    pixels = Clip(rounded, least, most)
    scaled = Mul(pixels, scale)
    net_input = Add(scaled, offset)
}}
"""

# by the number of channels: constants, nodes. Grey is ITU-R 601 in whole numbers, as Pillow has it
COLOR_GRAPHS = {
    1: (
        "int64[1] last = {-1}, float[3] luma = {19595, 38470, 7471}, float half = {32768}, float whole = {65536}",
        """weighted = Mul(levels, luma)
    summed = ReduceSum<keepdims = 1>(weighted, last)
    raised = Add(summed, half)
    shared = Div(raised, whole)
    coloured = Floor(shared)""",
    ),
    3: ("float[3] each = {1, 1, 1}", "coloured = Mul(levels, each)"),  # which makes three channels of one
}

# from logits and features to the answer; see Trust.strangeness
OUTPUT_GRAPH = """
back (float[N, K] logits, float[N, D] features) => (float[N, K] probabilities, int64[N] label)
<float temperature = {{{temperature!r}}}>
{{
    tempered = Div(logits, temperature)
    probabilities = Softmax<axis = -1>(tempered)
    label = ArgMax<axis = -1, keepdims = 0>(tempered)
}}
"""

OOD_GRAPH = """
known (float[N, K] logits, float[N, D] features) => (bool[N] known)
<int64[1] classes = {{1}}, int64[1] along = {{-1}}, float threshold = {{{threshold!r}}},
 float far = {{{distance[0]!r}}}, float far_spread = {{{distance[1]!r}}},
 float high = {{{energy[0]!r}}}, float high_spread = {{{energy[1]!r}}}>
{{
    white = MatMul(features, whitener)
    centres = MatMul(means, whitener)
    beside = Unsqueeze(white, classes)
    apart = Sub(beside, centres)
    distances = ReduceL2<keepdims = 0>(apart, along)
    nearest = ReduceMin<keepdims = 0>(distances, along)
    farther = Sub(nearest, far)
    strange_place = Div(farther, far_spread)
    total = ReduceLogSumExp<keepdims = 0>(logits, along)
    energy = Neg(total)
    higher = Sub(energy, high)
    strange_energy = Div(higher, high_spread)
    strangeness = Add(strange_place, strange_energy)
    known = LessOrEqual(strangeness, threshold)
}}
"""

"""The kinds of torch operations, by which rules are chosen.

An operation in none of the tables has no kind, and calling it raises an error: no operation takes part in a modified
backward pass without a rule.
"""

from __future__ import annotations

import enum

__all__ = ["CUTS", "DIFFERENTIATES", "INERT", "KINDS", "LIKE", "Kind"]


class Kind(enum.Enum):
    """The kind of an operation: its effect on the operands, the tensors that depend on the network's input."""

    MOVE = "moves, copies or drops elements"
    LINEAR = "adds elements with constant coefficients"
    CONVOLUTION = "convolution or transposed convolution with constant weights"
    DENSE = "fully connected layer with constant weights"
    ACTIVATION = "elementwise rectifier: ReLU and its relatives"
    UNIVARIATE = "any other elementwise function of one tensor"
    PRODUCT = "bilinear in two operands"
    MAXIMUM = "the largest of several elements"
    NORM = "divides by a statistic of the same tensor"
    SOFTMAX = "softmax or its logarithm"
    COMPOSITE = "composed of the other kinds; decomposed"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Queries about a tensor and new tensors of its shape: the result does not depend on its values.
INERT = _words(
    """dim ndim shape size numel nelement stride storage_offset is_contiguous device dtype layout requires_grad
    is_leaf is_cuda is_cpu is_meta is_sparse is_quantized is_mkldnn is_nested is_floating_point is_complex is_signed
    is_same_size element_size itemsize nbytes data_ptr get_device __len__ __hash__ __repr__ __format__ grad_fn names
    has_names _version _is_view is_inference is_tensor result_type zeros_like ones_like empty_like full_like rand_like
    randn_like new_zeros new_ones new_empty new_full requires_grad_ retain_grad retains_grad output_nr ndimension
    is_neg is_conj is_distributed __set__requires_grad"""
)
#: Operations that read only device, dtype or shape of their second tensor.
LIKE = _words("to type_as view_as reshape_as expand_as")
#: Operations that differentiate.
DIFFERENTIATES = _words("grad backward")
#: Results that depend on the values but have no derivative. A network may compute them, but not its output from them.
CUTS = _words(
    """detach data isnan isinf isfinite isreal any all gt ge lt le eq ne not_equal greater greater_equal less
    less_equal equal allclose isclose logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not
    argmax argmin argsort sign round floor ceil trunc __bool__"""
)
_MOVE = _words(
    """view view_as reshape reshape_as flatten unflatten ravel squeeze unsqueeze permute transpose movedim
    t T mT adjoint expand expand_as repeat tile repeat_interleave broadcast_to broadcast_tensors contiguous clone
    cat stack hstack vstack dstack column_stack chunk split split_with_sizes tensor_split unbind hsplit vsplit dsplit
    unsafe_chunk unsafe_split narrow select index_select getitem setitem gather take take_along_dim masked_select
    masked_fill where roll flip fliplr flipud rot90 diagonal diag diag_embed tril triu pad constant_pad_nd unfold_copy
    pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle to float double half bfloat16 type type_as
    cpu cuda copy index_copy index_fill slice_scatter select_scatter index_put atleast_1d atleast_2d atleast_3d iter
    reversed as_tensor positive dropout alpha_dropout feature_alpha_dropout feature_dropout fill zero masked_scatter
    scatter"""
)
_LINEAR = _words(
    """add sub rsub neg sum mean avg_pool adaptive_avg_pool interpolate upsample upsample_nearest upsample_bilinear
    cumsum unfold fold index_add scatter_add trace sum_to_size"""
)
_CONVOLUTION = _words("conv conv_transpose")
_ACTIVATION = _words(
    """relu relu6 leaky_relu prelu elu celu selu gelu silu mish softplus hardtanh hardswish rrelu threshold clamp
    clamp_min clamp_max"""
)
_UNIVARIATE = _words(
    """sigmoid tanh hardsigmoid logsigmoid log_sigmoid softsign tanhshrink softshrink hardshrink exp expm1 exp2 log
    log1p log2 log10 sqrt rsqrt reciprocal square pow rpow float_power abs sin cos tan atan sinh cosh asinh erf erfc"""
)
_PRODUCT = _words("mul matmul rmatmul mm bmm mv dot inner outer einsum")
_MAXIMUM = _words("max_pool adaptive_max_pool amax")
_NORM = _words("instance_norm group_norm layer_norm rms_norm normalize")
_SOFTMAX = _words("softmax log_softmax logsumexp")
_COMPOSITE = _words(
    """scaled_dot_product_attention multi_head_attention_forward std var std_mean var_mean norm vector_norm
    glu addcmul addcdiv addmm addbmm baddbmm addmv lerp cosine_similarity softmin rdiv amin max min maximum minimum"""
)
#: The kind of every operation whose kind does not depend on its arguments.
KINDS: dict[str, Kind] = {
    name: kind
    for kind, names in {
        Kind.MOVE: _MOVE,
        Kind.LINEAR: _LINEAR,
        Kind.CONVOLUTION: _CONVOLUTION,
        Kind.DENSE: {"linear"},
        Kind.ACTIVATION: _ACTIVATION,
        Kind.UNIVARIATE: _UNIVARIATE,
        Kind.PRODUCT: _PRODUCT,
        Kind.MAXIMUM: _MAXIMUM,
        Kind.NORM: _NORM,
        Kind.SOFTMAX: _SOFTMAX,
        Kind.COMPOSITE: _COMPOSITE,
    }.items()
    for name in names
}

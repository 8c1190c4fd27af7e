"""A traced program as an ONNX file: ``python -m paddle_dit.deploy.onnx_export PROGRAM.json FILE.onnx fp32 OUTPUT ...``.

In a process of its own, because paddle2onnx ends the process where it cannot convert.
"""

import collections
import json
import sys
from pathlib import Path

import onnx

OPSET, GELU_OPSET = 17, 20  # the latter is the first with a Gelu that knows the tanh form

UPDATE = ("combination", "coefficients", "previous_x0", "noise")  # inputs; what depends on them is the sampler's
DELICATE = ("Cos", "Sin", "Exp", "LayerNormalization", "InstanceNormalization", "Softmax")


def main(program: str, output: str, precision: str, names: list[str]) -> None:
    """Convert, mend and write.

    Args:
        program: file of the traced program; its weights lie beside it.
        output: file to write.
        precision: "fp32" or "fp16".
        names: of the outputs, in order.
    """
    import paddle2onnx

    weights = Path(program).with_suffix(".pdiparams")
    round_attributes(Path(program))
    # Its optimizer is left out: it installs packages by itself, and ONNX Runtime folds constants anyway.
    paddle2onnx.export(program, str(weights), output, opset_version=OPSET, optimize_tool="None")
    model = onnx.load(output)
    tidy(model.graph)
    if restore_gelu(model.graph):
        model.opset_import[0].version = GELU_OPSET
    rename_outputs(model.graph, names)
    if precision == "fp16":
        model = halve(model)
    onnx.checker.check_model(model)
    onnx.save(model, output)


def round_attributes(program: Path) -> None:
    """Rewrite float64 attributes as float32 in a traced program, as earlier Paddles had them.

    paddle2onnx 2.1.0 does not know the scales of an interpolation otherwise, and of GroupNorm's epsilon, which Paddle
    3.3 has as float64, it writes whatever is in memory.
    """
    values = json.loads(program.read_text(encoding="utf-8"))
    for region in values["program"]["regions"]:
        for operation in (operation for block in region["blocks"] for operation in block["ops"]):
            if not operation["#"].endswith(("_interp", ".group_norm")):
                continue
            for attribute in operation["A"]:
                if attribute["N"] in ("epsilon", "scale"):
                    _round(attribute["AT"])
    program.write_text(json.dumps(values), encoding="utf-8")


def _round(attribute: dict) -> None:
    if attribute["#"] == "0.a_array":
        for item in attribute["D"]:
            _round(item)
    elif attribute["#"] == "0.a_f64":
        attribute["#"] = "0.a_f32"


def tidy(graph: onnx.GraphProto) -> None:
    """Make the constants initializers, of which unused ones go, and leave out nodes that hand on what they get."""
    renamed, kept, constants = {}, [], []
    for node in graph.node:
        if node.op_type == "Constant":
            tensor = node.attribute[0].t
            tensor.name = node.output[0]
            constants.append(tensor)
        elif node.op_type == "Identity":
            renamed[node.output[0]] = renamed.get(node.input[0], node.input[0])
        else:
            kept.append(node)
    for node in kept:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    used = {name for node in kept for name in node.input}
    initializers = [tensor for tensor in [*graph.initializer, *constants] if tensor.name in used]
    for output in graph.output:
        if output.name in renamed:
            kept.append(onnx.helper.make_node("Identity", [renamed[output.name]], [output.name]))
    del graph.node[:], graph.initializer[:]
    graph.node.extend(kept)
    graph.initializer.extend(initializers)


def restore_gelu(graph: onnx.GraphProto) -> int:
    """Put the tanh form of GELU where paddle2onnx wrote the exact one in five nodes, which differs by up to 5e-4.

    Returns:
        how many there were.

    Raises:
        ValueError: an erf that is no part of such a GELU.
    """
    made = {name: node for node in graph.node for name in node.output}
    takers = collections.defaultdict(list)
    for node in graph.node:
        for name in node.input:
            takers[name].append(node)
    dropped, gelus = set(), {}
    for erf in [node for node in graph.node if node.op_type == "Erf"]:
        chain = [made[erf.input[0]], erf]
        while len(chain) < 5 and len(takers[chain[-1].output[0]]) == 1:
            chain += takers[chain[-1].output[0]]
        if [node.op_type for node in chain] != ["Div", "Erf", "Add", "Mul", "Mul"]:
            raise ValueError("an erf outside of a GELU")
        last = chain[-1].output[0]
        dropped |= {node.output[0] for node in chain}
        gelus[last] = onnx.helper.make_node("Gelu", [chain[0].input[0]], [last], approximate="tanh")
    nodes = [gelus.get(node.output[0], node) for node in graph.node]
    nodes = [node for node in nodes if node.op_type == "Gelu" or node.output[0] not in dropped]
    del graph.node[:]
    graph.node.extend(nodes)
    return len(gelus)


def rename_outputs(graph: onnx.GraphProto, names: list[str]) -> None:
    """Give the outputs their names."""
    new = dict(zip([output.name for output in graph.output], names, strict=True))
    for node in graph.node:
        node.input[:] = [new.get(name, name) for name in node.input]
        node.output[:] = [new.get(name, name) for name in node.output]
    for output in graph.output:
        output.name = new[output.name]


def halve(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model that computes in float16, but for its inputs, its outputs, and what float16 cannot hold.

    That is the sampler's update, whose coefficients reach into the hundreds and nearly cancel, the sinusoids of the
    timesteps, and sums of squares.
    """
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    reached, kept = set(UPDATE), []
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{index}"
        if reached & set(node.input):
            reached |= set(node.output)
            kept.append(node.name)
    halved = convert_float_to_float16(
        model, keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, *DELICATE], node_block_list=kept
    )
    single = {node.output[0]: node for node in halved.graph.node}  # a cast that two nodes need is there twice
    del halved.graph.node[:]
    halved.graph.node.extend(single.values())
    OnnxModel(halved).topological_sort()
    return halved


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])

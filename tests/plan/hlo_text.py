"""The text of small HLO modules, as the TPU compiler writes them."""


def line(name, shape, opcode, operands="", attributes="", op_name="", cycles=0):
    """Returns an instruction as the compiler writes it."""
    metadata = f', metadata={{op_name="{op_name}" stack_frame_id=3}}' if op_name else ""
    config = f', backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}' if cycles else ""
    comma = ", " if attributes else ""
    return f"  {name} = {shape} {opcode}({operands}){comma}{attributes}{metadata}{config}"


def module(entry, *computations):
    """Returns the text of a module of computations, each a name and its lines, after which comes the entry."""
    blocks = [
        f"%{name} (p: f32[8], /*index=1*/q: s32[]) -> f32[8] {{\n" + "\n".join(lines) + "\n}" for name, lines in computations
    ]
    return "\n\n".join(
        ["HloModule jit_f, is_scheduled=true", *blocks, "ENTRY %main (p: f32[8]) -> f32[8] {\n" + "\n".join(entry) + "\n}"]
    )


def loop(name, trips, body):
    """Returns the `while` instruction, and the computations of a loop."""
    condition = [
        line("%limit", "s32[]{:T(128)}", "constant", str(trips)),
        line("%state", "(s32[], f32[8]{0})", "parameter", "0"),
        line("%i", "s32[]", "get-tuple-element", "%state", "index=0"),
        line("ROOT %less", "pred[]", "compare", "%i, %limit", "direction=LT"),
    ]
    instruction = line(f"%{name}", "(s32[], f32[8]{0})", "while", "%t", f"condition=%{name}_condition, body=%{name}_body")
    return instruction, (f"{name}_condition", condition), (f"{name}_body", body)


def kernel(name, shape, operands, op_name=""):
    """Returns a call of a Pallas kernel."""
    attributes = 'custom_call_target="tpu_custom_call", operand_layout_constraints={f32[8]{0}}'
    return line(f"%{name}", shape, "custom-call", operands, attributes, op_name)

"""The rules of student.initialise that the two shapes choose where the configuration names none."""

from transformers import PretrainedConfig

from largekd.config.initialise import InitialiseConfig, LayerRule, WidthRule
from largekd.initialisation.expert_shapes import has_experts, mapped_sizes
from largekd.initialisation.kinds import choose_layers, layer_kinds
from largekd.initialisation.sizes import sizes_of


def settled(config: InitialiseConfig, *, teacher: PretrainedConfig, student: PretrainedConfig) -> InitialiseConfig:
    """`config` with a rule in the place of each null; for shapes whose family and experts agree.

    width: importance where the student has fewer hidden units, heads, key heads, or neurons of some layer than the
    teacher. truncate where it has not, where experts are narrower, which have no activations in common that could be
    measured, and with a gain, which belongs to this rule. Errors: ConfigError for layers that do not exist or fit.
    """
    layers = layers_rule(config, teacher=teacher, student=student)
    named = config.model_copy(update={"layers": layers})
    return named.model_copy(update={"width": config.width or _width_rule(named, teacher=teacher, student=student)})


def layers_rule(
    config: InitialiseConfig, *, teacher: PretrainedConfig, student: PretrainedConfig
) -> LayerRule | tuple[int, ...]:
    """The rule of the layers: block_influence for fewer layers than the teacher has, and for as many uniform, which
    then takes all and measures nothing, unless the configuration names another."""
    if config.layers is not None:
        return config.layers
    return "block_influence" if student.num_hidden_layers < teacher.num_hidden_layers else "uniform"


def _width_rule(config: InitialiseConfig, *, teacher: PretrainedConfig, student: PretrainedConfig) -> WidthRule:
    if config.gain:
        return "truncate"
    theirs, ours = sizes_of(teacher), sizes_of(student)
    shorter = any(ours.of(role) < theirs.of(role) for role in ("width", "heads", "kv_heads"))
    narrower = _narrower(config, teacher=teacher, student=student)
    return "importance" if (shorter or narrower) and "experts" not in narrower else "truncate"


def _narrower(config: InitialiseConfig, *, teacher: PretrainedConfig, student: PretrainedConfig) -> set[str]:
    """What has fewer neurons in the student than in the teacher's layer it is made of: an "MLP", "experts", or both.

    Before the layers are measured every one of the teacher's stands for those of the student that are of its kind.
    """
    assert config.layers is not None
    chosen = choose_layers(config.layers, teacher=teacher, student=student)
    choices = [chosen]
    if config.layers == "block_influence":
        choices = [(old,) * len(chosen) for old in range(teacher.num_hidden_layers)]
    kinds, own_kinds = layer_kinds(teacher, other=student), layer_kinds(student, other=teacher)
    had, found = sizes_of(teacher), set()
    for layers in choices:
        has = mapped_sizes(config.experts, teacher=teacher, student=student, layers=layers)
        for new, old in enumerate(layers):
            if kinds[old] == own_kinds[new] and has.neurons(new) < had.neurons(old):
                found.add("experts" if has_experts(teacher, layer=old) else "MLP")
    return found

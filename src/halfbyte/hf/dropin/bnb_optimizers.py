"""bitsandbytes' optimizers (0.50 ``bitsandbytes.optim``) over :class:`halfbyte.optim.AdamW`: its names and arguments.

Adam is AdamW there too (the decay is decoupled in both), with no decay by default. Overrides of single parameters
(``GlobalOptimManager``) say how many bits their state takes; others are refused.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from halfbyte.hf.dropin.said import say
from halfbyte.optim import AdamW as OurAdamW
from halfbyte.optim.adamw import SMALLEST_8BIT


class GlobalOptimManager:
    """Options of single parameters, said before an optimizer's first step; there is one, :meth:`get_instance`."""

    _instance: "GlobalOptimManager | None" = None
    pid2config: dict[int, dict[str, Any]]
    module_weight_config_triple: list[tuple[nn.Module, str, dict[str, Any]]]

    def __init__(self) -> None:
        raise RuntimeError("Call get_instance() instead")

    def initialize(self) -> None:
        """Forget everything."""
        self.pid2config = {}
        self.module_weight_config_triple = []
        self.uses_config_override = False

    @classmethod
    def get_instance(cls) -> "GlobalOptimManager":
        """Return the one manager."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def register_parameters(self, params: Iterable[Any]) -> None:
        """Nothing needs to be registered: parameters keep their identity here."""

    def override_config(
        self, parameters: Any, key: str | None = None, value: Any = None, key_value_dict: dict[str, Any] | None = None
    ) -> None:
        """Set options of ``parameters``, a tensor or several."""
        self.uses_config_override = True
        options = key_value_dict if key is None else {key: value}
        for parameter in [parameters] if isinstance(parameters, Tensor) else parameters:
            self.pid2config[id(parameter)] = self.pid2config.get(id(parameter), {}) | (options or {})

    def register_module_override(self, module: nn.Module, param_name: str, config: dict[str, Any]) -> None:
        """Set options of the parameter ``param_name`` of ``module``."""
        self.module_weight_config_triple.append((module, param_name, config))


def bits_of(parameter: Tensor, default: int) -> int:
    """Return how many bits the state of ``parameter`` takes: ``default``, or as the manager was told.

    Raises:
        ValueError: it was told something else than that.
    """
    import bitsandbytes  # the stand-in, or the real one

    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    options = dict(manager.pid2config.get(id(parameter), {}))
    for module, name, config in manager.module_weight_config_triple:
        if getattr(module, name) is parameter:
            options |= config
    bits = options.pop("optim_bits", default)
    if options or bits not in (8, 32):
        raise ValueError(
            f"GlobalOptimManager was told {options or {'optim_bits': bits}} for a parameter; of one parameter only "
            "optim_bits, 8 or 32, can be set here. Give others as options of a group of parameters."
        )
    return int(bits)


class _Adam(OurAdamW):
    """One of bitsandbytes' names.

    Attributes:
        bits: of its state where the name says so; else ``optim_bits`` does.
        pages: whether the name says that its state is paged.
    """

    bits: int | None = None
    pages = False

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = SMALLEST_8BIT,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        is_paged: bool = False,
    ) -> None:
        name = type(self).__name__
        refused = {
            f"amsgrad={amsgrad}": amsgrad,
            f"optim_bits={optim_bits}": optim_bits not in (8, 32) or (self.bits == 8 and optim_bits != 32),
            f"args={args!r}": args is not None,
            f"percentile_clipping={percentile_clipping}": percentile_clipping != 100,
            f"block_wise={block_wise}": not block_wise,
        }
        for option in [option for option, given in refused.items() if given]:
            raise ValueError(f"{name} does not take {option}; leave it out.")
        if min_8bit_size < SMALLEST_8BIT:
            say(f"min_8bit_size={min_8bit_size}: tensors under {SMALLEST_8BIT} elements have 32-bit state here.")
        self.min_8bit_size = min_8bit_size
        bits = optim_bits if self.bits is None else self.bits
        super().__init__(params, lr, betas, eps, weight_decay, state_bits=bits, paged=self.pages or is_paged)

    def _bits(self, param: Tensor) -> int:
        bits = bits_of(param, self.state_bits)
        return 32 if param.numel() < self.min_8bit_size else bits


def _named(name: str, bits: int | None, pages: bool, weight_decay: float) -> type[_Adam]:
    def __init__(
        self: _Adam,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = weight_decay,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        _Adam.__init__(self, params, lr, betas, eps, weight_decay, *args, **kwargs)

    state = f"{bits}-bit state" if bits else "state of optim_bits bits"
    about = f"AdamW with {state}{', paged' if pages else ''}; weight decay {weight_decay} unless said otherwise."
    members = {"bits": bits, "pages": pages, "__init__": __init__, "__doc__": about, "__module__": __name__}
    return type(name, (_Adam,), members)


OPTIMIZERS: dict[str, type[_Adam]] = {
    name: _named(name, bits, bool(paged), decay)
    for paged in ("", "Paged")
    for kind, decay in (("Adam", 0.0), ("AdamW", 1e-2))
    for name, bits in ((f"{paged}{kind}", None), (f"{paged}{kind}8bit", 8), (f"{paged}{kind}32bit", 32))
}
"""Adam and AdamW, each plain or paged, with state in as many bits as its name says."""
globals().update(OPTIMIZERS)  # so that they can be copied and pickled

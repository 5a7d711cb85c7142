"""A whole conversion: calibrate, solve, plan, write. And finding the sidecar of a model, or making it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from xkv_gguf import __version__
from xkv_gguf.base.partial import Partial
from xkv_gguf.convert.calibrate import TextPlan, collect, plan_text
from xkv_gguf.convert.capture import Sums
from xkv_gguf.convert.engine import Engine
from xkv_gguf.convert.estimate import Work, measure_rate, n_solvers, split_runs
from xkv_gguf.convert.sensitivity import n_source, n_token
from xkv_gguf.convert.settings import Settings
from xkv_gguf.convert.solve import Basis, Solver
from xkv_gguf.convert.weigh import basis_arrays, weigh_groups, weigh_layers
from xkv_gguf.errors import SidecarError
from xkv_gguf.model.fingerprint import model_fingerprint, read_model_header
from xkv_gguf.plan.group_choice import Candidate, choose, predicted_distortion, within_reach
from xkv_gguf.plan.groups import LayerGroups, default_frame, group_layers
from xkv_gguf.plan.segments import Kind
from xkv_gguf.plan.sizes import ModelShape
from xkv_gguf.plan.wishes import Wishes
from xkv_gguf.runtime import loader
from xkv_gguf.runtime.shape import held_layers, model_shape
from xkv_gguf.sidecar.find import cached_sidecar, check_output, find_sidecar
from xkv_gguf.sidecar.info import Calibration, Group, SidecarInfo, sidecar_beside
from xkv_gguf.sidecar.read import read_sidecar
from xkv_gguf.sidecar.write import write_sidecar

__all__ = ["Converted", "convert", "ensure_sidecar", "find_sidecar"]


@dataclass(frozen=True)
class Converted:
    """What a conversion made. `notes` are lines for the user: what was asked for and could not be had as such."""

    path: Path
    info: SidecarInfo
    notes: tuple[str, ...]


def convert(
    model: Path, out: Path | None, settings: Settings, show_progress: bool = True, *, force: bool = False
) -> Converted:
    """Calibrate a GGUF model and write its sidecar.

    OUT.partial keeps the runs for weights while they are made: interrupted, the same conversion takes them up, after it
    has calibrated again.

    Parameters
    ----------
    model : Path
        GGUF model; of a split model, its first file.
    out : Path, optional
        The sidecar; None is MODEL.xkv.gguf beside the model.
    settings : Settings
    show_progress : bool
        Draw progress bars on stderr.
    force : bool
        Replace another model's sidecar. The model's own is replaced anyway, and what is no sidecar never is.

    Returns
    -------
    Converted

    Raises
    ------
    ModelError, UnsupportedError
        The model cannot be read or used.
    OptionError
        A setting does not fit the model, found out before the long part begins where that can be known; or OUT.partial
        is something else, or cannot be written; or OUT is a file that is not replaced.
    OutOfMemoryError
        It does not fit into memory.
    CalibrationError
        There is too little text, or the model fails on it.
    SidecarError
        The file cannot be written.
    """
    header = read_model_header(model)
    out = out if out is not None else sidecar_beside(model)
    check_output(out, model, force)
    fingerprint = model_fingerprint(model)
    basis = {
        "model": fingerprint,
        "size": model.stat().st_size,
        "version": __version__,
        "build": loader.load().build_id,
        "settings": settings.record(),
    }
    partial = Partial(out, "convert", basis)
    with _telling(partial, show_progress), Engine(model, settings.threads) as engine:
        shape = model_shape(engine.model_pointer)
        sinks = any(layer.sinks for layer in held_layers(engine.model_pointer))
        wishes = Wishes(settings.plan_ctx(engine.n_ctx_train), settings.target, settings.n_sink)
        sizes = settings.group_sizes(shape)
        captured = LayerGroups.of(group_layers(shape.layers, sizes[-1]), shape.embd_k, shape.embd_v)
        candidates = [Candidate.of(size, captured, shape) for size in sizes]
        frame = settings.frame if settings.frame is not None else default_frame(shape.head_k)
        candidates = within_reach(candidates, shape, wishes, frame)
        biggest = max(max(dims) for dims in captured.dims.values())
        n_wanted = settings.n_token(biggest)
        plan = plan_text(engine, settings, n_wanted, sum(map(sum, captured.embd.values())))
        # of one layer in a group, a scale changes nothing
        by_layer = settings.weigh == "layers" and sizes[-1] > 1
        work = _work(captured, settings, plan, by_layer)
        work.check_memory(model)
        if show_progress:
            print(work.told(measure_rate(engine, work.n_seq)), file=sys.stderr)
        notes = []
        if work.n_token < 4 * biggest:
            notes.append(
                f"{work.n_token} calibration tokens are few for groups of {biggest} numbers, {4 * biggest} are advised"
            )
        n_run = work.n_token * len(list(split_runs(captured)))
        n_basis = sum(n_source(candidate.groups) for candidate in candidates)
        with (
            tqdm(total=n_run, desc="calibrating", unit="tok", disable=not show_progress) as run_bar,
            tqdm(total=n_basis, desc="solving", unit="basis", disable=not show_progress) as solve_bar,
            Solver[tuple[int, int, Kind]](
                n_solvers(biggest, settings.threads), settings.basis_type, solve_bar.update
            ) as solver,
        ):

            def submit(captured_group: int, kind: Kind, sums: Sums) -> None:
                if kind == "v" and sinks:  # their weights do not sum to one, so that a mean could not be given back
                    sums = replace(sums, total=np.zeros_like(sums.total))
                for candidate in candidates:
                    for g in (g for g, inside in enumerate(candidate.inside) if inside == captured_group):
                        part = sums.cut(candidate.part(g, kind))
                        what = f"{kind.upper()} of layers {candidate.groups.name(g)}"
                        solver.submit((candidate.size, g, kind), part.gram, part.total, part.n_tokens, what)

            held: dict[tuple[int, Kind], Sums] = {}

            def hold(captured_group: int, kind: Kind, sums: Sums) -> None:
                held[captured_group, kind] = sums

            use = hold if by_layer else submit
            text = collect(engine, captured, settings, frame, plan, run_bar.update, use)
            info = SidecarInfo(
                fingerprint=fingerprint,
                architecture=header.scalar("general.architecture"),
                name=str(header.scalar("general.name", "")),
                embd_k=shape.embd_k,
                embd_v=shape.embd_v,
                group_size=1,
                frame=frame,
                n_sink=settings.n_sink,
                groups=(),
                calibration=Calibration(
                    "files" if settings.data else "package", text.n_tokens, settings.seed, text.n_len, text.sha256
                ),
                settings=settings.record(sizes[-1], frame),
                target=settings.target,
                n_ctx=wishes.n_ctx,
            )
            layers = (
                weigh_layers(engine, info, captured, held, shape, text, settings.n_score, partial, show_progress)
                if by_layer
                else None
            )
            if by_layer and layers is None:
                notes.append(
                    "layers are not weighed (too little text, or too small a model); groups are, where possible"
                )
            for g, kind in list(held):
                sums = held.pop((g, kind))
                submit(g, kind, layers.scale(captured, g, kind, sums) if layers else sums)
            bases = solver.results()

        chosen, tried = _choose(candidates, bases, shape, wishes, frame)
        notes += tried
        taken = {(g, kind): basis for (size, g, kind), basis in bases.items() if size == chosen.size}
        groups = tuple(map(Group, chosen.groups.layers))
        info = replace(info, group_size=chosen.size, groups=groups)
        if layers:
            info = layers.add_to(info)
        elif settings.weigh != "none":
            info = weigh_groups(engine, info, taken, shape, text, settings.n_score, partial, show_progress)
    write_sidecar(out, info, basis_arrays(taken))
    partial.remove()
    return Converted(out, info, tuple(notes))


def _work(captured: LayerGroups, settings: Settings, plan: TextPlan, by_layer: bool) -> Work:
    """What a conversion comes to, before it begins."""
    groups = LayerGroups.of([(il,) for g in captured.layers for il in g], captured.embd["k"], captured.embd["v"])
    n_weighed = n_source(groups if by_layer else captured)
    n_weigh = 0 if settings.weigh == "none" else n_token(n_weighed, settings.n_score)
    return Work(captured, settings.threads, plan.n_seq, plan.longest, plan.n_token, n_weigh, by_layer)


@contextmanager
def _telling(partial: Partial, show: bool) -> Iterator[None]:
    """Tell on stderr what an interrupted run keeps, if it keeps anything."""
    try:
        yield
    except KeyboardInterrupt:
        if show and partial.n_taken + partial.n_put:
            print(f"\n{partial.path} keeps what is weighed: the same command takes it up", file=sys.stderr)
        raise


def _choose(
    candidates: list[Candidate],
    bases: dict[tuple[int, int, Kind], Basis],
    shape: ModelShape,
    wishes: Wishes,
    frame: int,
) -> tuple[Candidate, list[str]]:
    """The candidate to write, and a note that compares them where there are several."""
    if len(candidates) == 1:
        return candidates[0], []
    found: dict[int, float] = {}
    for candidate in candidates:
        spectra = {(g, kind): basis.spectrum for (size, g, kind), basis in bases.items() if size == candidate.size}
        found[candidate.size] = predicted_distortion(candidate.statistics(spectra, frame), shape, wishes)
    size = choose(found)
    values = ", ".join(f"{n}: {value:.4f}" for n, value in found.items())
    note = f"group size {size} is taken; predicted distortion at {wishes.target} by group size: {values}"
    return next(candidate for candidate in candidates if candidate.size == size), [note]


def ensure_sidecar(
    model: str | Path, sidecar: str | Path | None = None, *, threads: int | None = None, show_progress: bool = True
) -> Path:
    """Find a model's sidecar and check it, or make it with default settings in the cache folder.

    Parameters
    ----------
    model : str or Path
        GGUF model.
    sidecar : str or Path, optional
        Take this file and look nowhere else.
    threads : int, optional
        Threads for making it.
    show_progress : bool
        Draw progress bars on stderr while making it.

    Returns
    -------
    Path
        A sidecar that was read, is whole, and was made for this model.

    Raises
    ------
    SidecarError, SidecarVersionError, SidecarMismatchError
        The file that was found cannot be used. It is not replaced silently.
    ModelError, UnsupportedError, CalibrationError, OptionError
        See `convert`.
    """
    model = Path(model)
    found = Path(sidecar) if sidecar is not None else find_sidecar(model)
    if found is not None:
        read_sidecar(found).check_model(model)
        return found
    out = cached_sidecar(model)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise SidecarError(
            f"cache folder {out.parent}: cannot be made ({err.strerror}); use `xkv-gguf convert {model} -o FILE`"
        ) from err
    print(
        f"xkv-gguf: {model.name} has no sidecar yet; calibrating once into {out} "
        "(choose settings with `xkv-gguf convert`)",
        file=sys.stderr,
    )
    settings = Settings() if threads is None else Settings(threads=threads)
    done = convert(model, out, settings, show_progress)
    for note in done.notes:
        print(f"note: {note}", file=sys.stderr)
    return done.path

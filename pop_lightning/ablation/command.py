"""``pop-generate ablate``: load a base and rows, run the ablation, and write what it found."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pop_lightning.ablation import report
from pop_lightning.ablation.ablate import PAGE, Settings, run
from pop_lightning.benchmark import benchmark
from pop_lightning.core.files import check_output_folder
from pop_lightning.core.pages import circumstances
from pop_lightning.data.examples import check_source
from pop_lightning.data.module import CalibrationData
from pop_lightning.data.processor import vision_processor
from pop_lightning.generation.generator import StageAwareGenerator
from pop_lightning.models.decoder import Decoder
from pop_lightning.models.loading import context_length, end_tokens, load_tokenizer


def ablate(
    *,
    data: str,
    output: str,
    settings: Mapping[str, Any],
    artifact: str | None = None,
    base: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    **rows,
) -> str:
    """Measure a base, or that of an artifact, at the artifact's depth and boundary unless given; returns the tables.

    Only the base and the plan of an artifact are used: its projections were fitted on other rows.

    Args:
        data: as ``data.calibration`` of a recipe.
        output: a folder; ``ablation.json`` and ``ablation.html`` in it are replaced.
        settings: of :class:`~pop_lightning.ablation.ablate.Settings`, those that were given.
        rows: arguments of :class:`CalibrationData`.

    Raises:
        InputError: something does not load, or does not go together.
    """
    Settings(**settings)
    check_source(data)
    check_output_folder(Path(output).expanduser())
    target = benchmark.load(
        artifact=artifact, base=base, dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )
    if isinstance(target, StageAwareGenerator):
        decoder, tokenizer, vision = target.decoder, target.tokenizer, target.vision
        settings = {"depth": target.plan.depth, "boundary": target.plan.boundary} | settings
    else:
        decoder, source = Decoder(target), {"trust_remote_code": trust_remote_code}
        tokenizer, vision = load_tokenizer(base, **source), vision_processor(decoder.vision_tokens, base, **source)
    read = CalibrationData(
        data,
        tokenizer,
        context=context_length(decoder.model),
        end_tokens=end_tokens(decoder.model),
        vision=vision,
        **rows,
    )
    folder = Path(output).expanduser()
    result = run(decoder, read, Settings(**settings), folder)
    about = {"model": base or artifact, "data": f"{data}: {read.report}"}
    same = f"pop-generate ablate --{'base' if artifact is None else 'artifact'} {about['model']} --data {data}"
    report.write(result, folder, about | circumstances("pop-generate", f"{same} --output {output}"))
    return f"{report.text(result)}\npage: {folder / PAGE}\n"

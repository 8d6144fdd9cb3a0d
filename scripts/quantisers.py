"""Measures what each quantiser loses and draws docs/guides/quantisation.svg. Prints the table of the guide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier import recipe
from luthier.kernels import quantize as plain
from luthier.model import quantize

FIGURE = Path(__file__).parents[1] / "docs" / "guides" / "quantisation.svg"
SETTINGS: dict[str, Any] = {
    "nf4": recipe.FourBit(kind="nf4"),
    "nf4, double: false": recipe.FourBit(kind="nf4", double=False),
    "fp4": recipe.FourBit(kind="fp4"),
    "fp8": recipe.Float8(kind="fp8"),
    "int8": recipe.EightBit(kind="int8"),
}
SEEDS = 4


def weight(seed: int, *, heavy: bool) -> Tensor:
    """1024 x 1024 normal values, or of Student's t with 3 degrees of freedom."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(1024, 1024, generator=generator)
    return values / torch.randn(3, 1024, 1024, generator=generator).pow(2).mean(0).sqrt() if heavy else values


def lost(settings: Any, *, heavy: bool) -> float:
    """The largest share of a weight's norm that packing loses, in percent."""
    weights = [weight(seed, heavy=heavy) for seed in range(SEEDS)]
    kept = [quantize.pack(w, None, settings, torch.float32).dequantize() for w in weights]
    return max(float((k - w).norm() / w.norm()) for k, w in zip(kept, weights, strict=True)) * 100


def whole_tensor(*, heavy: bool) -> tuple[float, float]:
    """The same for the two references with one scale for all: absmax and zero-point."""
    w = weight(0, heavy=heavy)
    packed, scale = plain.absmax_int8(w)
    shifted, step, zero = plain.zeropoint_int8(w)
    back = (packed * scale, (shifted - zero) * step)
    return tuple(float((b - w).norm() / w.norm()) * 100 for b in back)  # type: ignore[return-value]


def bars(rows: list[tuple[str, float, float]]) -> str:
    """Two bars a row on a logarithmic scale from 0.5 to 50 percent."""

    def width(value: float) -> float:
        return float(torch.log10(torch.tensor(value / 0.5)) / 2 * 400)

    box = f'viewBox="0 0 680 {46 * len(rows) + 52}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {box} font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="#fff"/>',
    ]
    for tick in (0.5, 1, 2, 5, 10, 20, 50):
        x = 170 + width(tick)
        parts.append(f'<path d="M{x:.0f} 8V{46 * len(rows) + 12}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.0f}" y="{46 * len(rows) + 28}" text-anchor="middle" fill="#555">{tick:g} %</text>')
    for number, (name, *values) in enumerate(rows):
        y = 46 * number + 14
        parts.append(f'<text x="160" y="{y + 22}" text-anchor="end" fill="#111">{name}</text>')
        for line, (value, colour) in enumerate(zip(values, ("#2b6cb0", "#dd6b20"), strict=True)):
            top = y + 18 * line
            parts.append(f'<rect x="170" y="{top}" width="{width(value):.0f}" height="15" fill="{colour}"/>')
            parts.append(f'<text x="{176 + width(value):.0f}" y="{top + 12}" fill="#333">{value:.2f}</text>')
    legend = "share of a weight's norm that is lost; blue: normal values, orange: heavy tails (Student's t, 3 d.f.)"
    parts.append(f'<text x="10" y="{46 * len(rows) + 46}" fill="#555" font-size="12">{legend}</text></svg>')
    return "\n".join(parts) + "\n"


def main() -> None:
    rows = []
    print("| quantiser | bits a weight | lost: normal values | lost: heavy tails |\n| --- | --- | --- | --- |")
    for name, settings in SETTINGS.items():
        normal, heavy = lost(settings, heavy=False), lost(settings, heavy=True)
        rows.append((name, normal, heavy))
        bits = quantize.packed_bytes(4096, 4096, settings) * 8 / 4096**2
        print(f"| `{name}` | {bits:.2f} | {normal:.2f} % | {heavy:.2f} % |")
    pairs = zip(("absmax", "zero-point"), whole_tensor(heavy=False), whole_tensor(heavy=True), strict=True)
    for name, normal, heavy in pairs:
        rows.append((f"{name}, one scale", normal, heavy))
        print(f"| {name} int8, one scale | 8.00 | {normal:.2f} % | {heavy:.2f} % |")
    FIGURE.write_text(bars(rows), encoding="utf-8")


if __name__ == "__main__":
    main()

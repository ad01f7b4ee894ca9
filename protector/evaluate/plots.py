"""Plots as plain SVG text: no plotting library, sharp at any size, colours from CSS variables with fallbacks.

Red is harmful or before, blue is harmless or after, everywhere; shape and label say the same, so colour is never alone.
"""
from html import escape

RED, BLUE, GREY, INK = "var(--red, #c0392b)", "var(--blue, #2166ac)", "var(--grey, #8a8f98)", "var(--ink, #1d2127)"
_SERIES = (BLUE, RED, "var(--green, #2e7d4f)", "var(--violet, #7b4fa3)", "var(--orange, #c77700)", "var(--teal, #16808a)")
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "1 2")


def _svg(width, height, body, title):
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}" '
            f'font-family="system-ui, sans-serif" font-size="12"><title>{escape(title)}</title>{"".join(body)}</svg>')


def _text(x, y, text, anchor="start", colour=INK, extra=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" {extra}>{escape(str(text))}</text>'


def _line(x1, y1, x2, y2, colour=GREY, width=1, dash=""):
    return (f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}"'
            + (f' stroke-dasharray="{dash}"' if dash else "") + "/>")


def _path(points, colour, dash="", width=2):
    data = " ".join(f"{'M' if i == 0 else 'L'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(points))
    return f'<path d="{data}" fill="none" stroke="{colour}" stroke-width="{width}"' + (f' stroke-dasharray="{dash}"' if dash else "") + "/>"


def _legend(names, x, y, colours, dashes=None, step=17):
    parts = []
    for i, name in enumerate(names):
        at, dash = y + i * step, dashes[i % len(dashes)] if dashes else ""
        parts += [_line(x, at - 4, x + 18, at - 4, colours[i % len(colours)], 3, dash), _text(x + 24, at, name)]
    return parts


def _square(side, left, top, at, name):
    """Frame, diagonal, ticks from 0 to 1 and the name of the vertical axis."""
    body = [f'<rect x="{left}" y="{top}" width="{side}" height="{side}" fill="none" stroke="{GREY}"/>',
            _line(*at(0, 0), *at(1, 1), GREY, 1, "3 3"),
            _text(12, top + side / 2, name, "middle", extra=f'transform="rotate(-90 12 {top + side / 2:.0f})"')]
    for tick in (0, 0.5, 1):
        body += [_text(at(tick, 0)[0], top + side + 16, f"{tick:g}", "middle"), _text(left - 6, at(0, tick)[1] + 4, f"{tick:g}", "end")]
    return body


def roc(curves, title="ROC"):
    """ROC curves on one square, with the whole FPR range.

    Args:
        curves: {name: [(false-positive rate, true-positive rate), ...]}.
    Returns:
        SVG text.
    """
    side, left, top = 260, 44, 14
    height = top + side + 46 + 17 * len(curves)

    def at(x, y):
        return left + x * side, top + (1 - y) * side

    body = _square(side, left, top, at, "harmful answers flagged")
    body.append(_text(left + side / 2, top + side + 32, "harmless answers flagged", "middle"))
    for i, points in enumerate(curves.values()):
        body.append(_path([at(*point) for point in points], _SERIES[i % 6], _DASHES[i % 6]))
    body += _legend(list(curves), left, top + side + 56, _SERIES, _DASHES)
    return _svg(left + side + 20, height, body, title)


def histogram(edges, harmless, harmful, threshold=None, title="Scores"):
    """Two score histograms back to back: harmful up, harmless down; each is scaled by its own size."""
    width, half, left, top = 330, 80, 16, 20
    body = []
    for counts, colour, sign in ((harmful, RED, -1), (harmless, BLUE, 1)):
        total = max(sum(counts), 1)
        largest = max(max(harmful, default=0) / max(sum(harmful), 1), max(harmless, default=0) / max(sum(harmless), 1), 1e-9)
        for low, high, count in zip(edges, edges[1:], counts):
            bar = half * count / total / largest
            if bar:
                y = top + half + (0 if sign > 0 else -bar)
                body.append(f'<rect x="{left + low * width:.1f}" y="{y:.1f}" width="{(high - low) * width - 1:.1f}" height="{bar:.1f}" '
                            f'fill="{colour}"/>')
    body.append(_line(left, top + half, left + width, top + half, INK))
    if threshold is not None and 0 <= threshold <= 1:
        x = left + threshold * width
        anchor, beside = ("end", -4) if threshold > 0.7 else ("start", 4)
        body += [_line(x, top - 6, x, top + 2 * half + 6, INK, 1.5, "4 3"),
                 _text(x + beside, top - 8, f"threshold {threshold:.2f}", anchor)]
    for tick in (0, 0.5, 1):
        body.append(_text(left + tick * width, top + 2 * half + 22, f"{tick:g}", "middle"))
    body += [_text(left, top - 8, f"harmful ({sum(harmful)})", colour=RED) if threshold is None or threshold > 0.3 else
             _text(left + width, top - 8, f"harmful ({sum(harmful)})", "end", RED),
             _text(left + width, top + 2 * half + 40, f"harmless ({sum(harmless)})", "end", BLUE),
             _text(left, top + 2 * half + 40, "score = P(harmful)")]
    return _svg(left + width + 20, top + 2 * half + 50, body, title)


def before_after(rows, title="Attack success"):
    """Horizontal bars before and after, with their intervals, and how many are missing.

    Args:
        rows: [(name, before, after)], each a metrics.rate.
    """
    left, width, step, top = 10, 270, 54, 30  # narrow, names above their bars: a phone shows it at a readable size
    body = [_line(left, 10, left + 18, 10, RED, 3), _text(left + 24, 14, "before"),
            _line(left + 80, 10, left + 98, 10, BLUE, 3), _text(left + 104, 14, "after")]
    for tick in (0, 0.25, 0.5, 0.75, 1):
        x = left + tick * width
        body += [_line(x, top, x, top + step * len(rows), GREY, 0.5),
                 _text(x, top + step * len(rows) + 16, f"{tick:.0%}", "middle" if tick else "start")]
    for i, (name, *rates) in enumerate(rows):
        y = top + i * step
        body.append(_text(left + 3, y + 15, _short(name), extra='font-weight="600"'))
        missing = max(value["missing"] for value in rates)
        if missing:
            body.append(_text(left + width + 8, y + 15, f"{missing} missing", colour=GREY))
        for j, (value, colour) in enumerate(zip(rates, (RED, BLUE))):
            at = y + 20 + 14 * j
            if value["rate"] is None:
                body.append(_text(left + 4, at + 10, "no verdict", colour=GREY))
                continue
            body += [f'<rect x="{left}" y="{at}" width="{max(value["rate"] * width, 1):.1f}" height="12" fill="{colour}" opacity="0.85"/>',
                     _line(left + value["low"] * width, at + 6, left + value["high"] * width, at + 6, INK, 1.5),
                     _text(left + width + 8, at + 10, f"{value['rate']:.0%} of {value['n']}")]
    return _svg(left + width + 84, top + step * len(rows) + 26, body, title)


def _short(name):
    name = name.rsplit("--", 1)[-1].rsplit("/", 1)[-1]
    return name if len(name) <= 28 else name[:27] + "…"


def reliability(bins, title="Calibration"):
    """Share harmful against mean score, a dot and its 95 % Wilson interval per bin, the bin's n below it.

    Args:
        bins: of metrics.reliability.
    """
    side, left, top = 290, 44, 12

    def at(x, y):
        return left + x * side, top + (1 - y) * side

    body = _square(side, left, top, at, "share harmful")
    body += [_text(left - 6, top + side + 32, "n", "end", GREY),
             _text(left + side / 2, top + side + 48, "score; dotted: what it promises", "middle")]
    for row in bins:
        low, high = row["interval"]
        x, y = at(row["score"], row["share"])
        body += [_line(x, at(0, low)[1], x, at(0, high)[1], BLUE, 1.5), f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{BLUE}"/>',
                 _text(at((row["low"] + row["high"]) / 2, 0)[0], top + side + 32, row["n"], "middle", GREY, 'font-size="9"')]
    return _svg(left + side + 20, top + side + 56, body, title)


def curves(conditions, title="Likelihood"):
    """Mean loss per token position: solid for harmful answers, dashed for harmless ones, a colour per condition."""
    width, height, left, top = 310, 210, 44, 12
    drawn = {name: part["curves"] for name, part in conditions.items() if part["n"]}
    values = [value for part in drawn.values() for curve in part.values() for value in curve]
    if not values:
        return _svg(200, 30, [_text(4, 20, "nothing was measured")], title)
    largest, longest = max(values) * 1.05, max(len(curve) for part in drawn.values() for curve in part.values())

    def at(t, value):
        return left + t / max(longest - 1, 1) * width, top + (1 - value / largest) * height

    body = [f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="{GREY}"/>']
    for i in range(5):
        body.append(_text(left - 6, at(0, largest * i / 4)[1] + 4, f"{largest * i / 4:.1f}", "end"))
    body += [_text(left, top + height + 16, "1", "middle"), _text(left + width, top + height + 16, longest, "middle"),
             _text(left + width / 2, top + height + 30, "token of the answer", "middle"),
             _text(12, top + height / 2, "nats per token", "middle", extra=f'transform="rotate(-90 12 {top + height / 2:.0f})"')]
    for i, part in enumerate(drawn.values()):
        body += [_path([at(t, value) for t, value in enumerate(part["harmful"])], _SERIES[i % 6]),
                 _path([at(t, value) for t, value in enumerate(part["harmless"])], _SERIES[i % 6], "5 3")]
    body += _legend(list(drawn), left, top + height + 54, _SERIES)
    body += [_text(left, top + height + 54 + 17 * len(drawn), "solid: harmful answers, dashed: harmless ones")]
    return _svg(left + width + 20, top + height + 64 + 17 * len(drawn), body, title)

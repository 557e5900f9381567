"""Draws the samples of a rush as SVG: requests in flight over the connections in use."""

from html import escape
from math import ceil, log10

from benchmarks.svg import text

WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, FLOOR = 66, 700, 92, 366
FLIGHT, LEASED, BACKENDS = 1, 2, 4  # columns of a sample

#: The picture has a ground of its own: its page may be light while the system is dark.
STYLE = """
text{font:18px system-ui,sans-serif;fill:#5a6a5f}
.t{font-size:25px;font-weight:650}.n{font-size:22px;font-weight:600}
.t,.n{fill:#1c2a22}.c{fill:#1f5c40;font-size:20px;font-weight:600}
.ground{fill:#fffef8;stroke:#cfd5c6}.g{stroke:#cfd5c6}
.flight{fill:#e8b923;fill-opacity:.38;stroke:#e8b923;stroke-width:2.5}
.leased{fill:#1f5c40;stroke:#1f5c40;stroke-width:3}path{stroke-linejoin:round}
@media(prefers-color-scheme:dark){
text{fill:#9fb0a4}.t,.n{fill:#e8ebdf}.c{fill:#a6e0bc}
.ground{fill:#101713;stroke:#35443b}.g{stroke:#35443b}
.flight{stroke:#efc443}.leased{fill:#8fcba6;stroke:#8fcba6}}
""".replace("\n", "")


def figures(taken):
    """Return the figures that captions tell, from the samples alone."""
    samples = taken["samples"]
    return {
        "in_flight": max(sample[FLIGHT] for sample in samples),
        "leased": max(sample[LEASED] for sample in samples),
        "backends": max(sample[BACKENDS] for sample in samples),
        "pool": taken["pool"],
        "orders": taken["orders"],
        "promised": taken["promised"],
        "samples": len(samples),
    }


def headline(taken):
    told = figures(taken)
    return f"{told['in_flight']:,} requests in flight, {told['leased']} connections in use"


def picture(taken):
    """Return the SVG of samples as ``proj.pictures.samples`` takes them."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
        f"<title>{escape(headline(taken))}</title><style>{STYLE}</style>"
        f'<rect class="ground" x=".5" y=".5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="10"/>'
        f"{''.join(_parts(taken))}</svg>\n"
    )


def _parts(taken):
    samples, told = taken["samples"], figures(taken)
    end, top = samples[-1][0], _ceiling(told["in_flight"])

    def x(seconds):
        return LEFT + seconds / end * (RIGHT - LEFT)

    def y(value):
        return FLOOR - value / top * (FLOOR - TOP)

    yield text(20, 40, headline(taken), "t")
    yield text(
        20, 67, f"a rush of {told['orders']:,} orders, one server process, a pool of {told['pool']}"
    )
    yield from _grid(x, y, end, top)
    yield f'<path class="flight" d="{_area(samples, FLIGHT, x, y)}"/>'
    yield f'<path class="leased" d="{_area(samples, LEASED, x, y)}"/>'
    peak = x(max(samples, key=lambda sample: sample[FLIGHT])[0])
    yield text(peak, (TOP + FLOOR) / 2 + 10, "requests in flight", "n", "middle")
    yield text(peak, FLOOR - 16, "connections in use", "c", "middle")


def _grid(x, y, end, top):
    for value in (0, top / 2, top):
        yield f'<path class="g" d="M{LEFT} {y(value):.1f}H{RIGHT}"/>'
        yield text(LEFT - 8, y(value) + 6, f"{value:,.0f}", "", "end")
    for seconds in range(0, int(end) + 1, 5):
        label = f"{seconds} s" if seconds else "0"
        yield text(x(seconds), FLOOR + 26, label, "", "middle")


def _area(samples, column, x, y):
    line = "L".join(f"{x(each[0]):.1f} {y(each[column]):.1f}" for each in samples)
    return f"M{x(0):.1f} {y(0):.1f}L{line}L{x(samples[-1][0]):.1f} {y(0):.1f}Z"


def _ceiling(value):
    """Return a round number above ``value``, whose half is round, too."""
    magnitude = 10 ** (ceil(log10(value + 1)) - 1)
    return next(n * magnitude for n in (1, 1.2, 1.6, 2, 3, 4, 6, 8, 10) if n * magnitude >= value)

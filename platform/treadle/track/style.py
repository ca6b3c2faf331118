"""The one style sheet of the report: light and dark, screen and paper."""

from __future__ import annotations

__all__ = ["PICTURE_STYLE", "STYLE"]

# Series colours keep their order in both themes and differ in lightness too, for colour-blind
# readers; text never takes a series colour.
_COLOURS = """
:root{color-scheme:light dark;--page:#f6f6f3;--card:#fff;--ink:#17181a;--soft:#5c6066;--faint:#8a8e94;
--line:#e3e3de;--grid:#ecece8;--code:#f4f4f0;--s0:#2a6fd6;--s1:#d9622b;--s2:#1a936f;--s3:#8a5bd1;--s4:#b98900;
--s5:#c2417c;
--good:#1a7f4b;--warn:#9a6700;--bad:#c0362c;--calm:#2a6fd6;--good-bg:#e3f4ea;--warn-bg:#fbf0d5;--bad-bg:#fce8e6;
--calm-bg:#e6effb}
@media (prefers-color-scheme:dark){:root{--page:#131416;--card:#1c1e21;--ink:#eceded;--soft:#a6abb2;--faint:#7d838b;
--line:#303337;--grid:#292c30;--code:#25282c;--s0:#5b9bf0;--s1:#f08a55;--s2:#3fbd92;--s3:#b18cf0;--s4:#dcb03c;
--s5:#ec79ab;
--good:#5fce92;--warn:#e6b450;--bad:#f28b82;--calm:#7db2f5;--good-bg:#173324;--warn-bg:#3a2f14;--bad-bg:#401f1c;
--calm-bg:#1b2c45}}
""".strip()

_PAGE = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:32px 20px 48px}
header h1{font-size:28px;line-height:1.2;margin:0 0 4px;letter-spacing:-.01em;overflow-wrap:anywhere}
header p{margin:4px 0;color:var(--soft);max-width:75ch;overflow-wrap:anywhere}
.facts{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:13.5px;color:var(--soft);margin-top:10px}
.facts b{color:var(--ink);font-weight:600}
h2{font-size:18px;margin:36px 0 12px;letter-spacing:-.005em}
h3{font-size:14px;font-weight:600;margin:0}
.pill{display:inline-block;border-radius:99px;padding:2px 10px;font-size:13px;font-weight:600;vertical-align:4px;
margin-left:8px}
.pill.good{background:var(--good-bg);color:var(--good)}.pill.warn{background:var(--warn-bg);color:var(--warn)}
.pill.bad{background:var(--bad-bg);color:var(--bad)}.pill.calm{background:var(--calm-bg);color:var(--calm)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:12px;margin-top:22px}
.card,.tile{background:var(--card);border:1px solid var(--line);border-radius:10px}
.tile{padding:12px 14px}.tile .name{font-size:12.5px;color:var(--soft);overflow-wrap:anywhere}
.tile .value{font-size:25px;font-weight:620;line-height:1.25;letter-spacing:-.01em;font-variant-numeric:tabular-nums}
.tile .value small{display:inline-block;line-height:1.3;font-size:13px;font-weight:400;
color:var(--soft);letter-spacing:0}
.tile .note{font-size:12px;color:var(--faint)}
.tile.first{border-color:var(--calm)}
.grid2{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:14px}
.card{padding:14px 16px;min-width:0}
.card>p{font-size:13px;color:var(--soft);margin:2px 0 8px}
.wide{grid-column:1/-1}
.scroll{overflow-x:auto}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:12.5px;color:var(--soft);margin:4px 0 6px}
.legend i{display:inline-block;width:14px;height:3px;border-radius:2px;margin-right:6px;vertical-align:3px}
""".strip()

_MARKS = """
svg text{fill:var(--soft)}svg .tick{font-variant-numeric:tabular-nums}svg .unit{fill:var(--faint)}
svg .halo{paint-order:stroke;stroke:var(--card);stroke-width:4px;stroke-linejoin:round}
svg .end{text-anchor:end}svg .mid{text-anchor:middle}
svg .grid{stroke:var(--grid)}svg .axis{stroke:var(--faint)}
svg .mark{stroke:var(--faint);stroke-dasharray:4 3}
svg .line{fill:none;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
svg path.s0{stroke:var(--s0)}svg path.s1{stroke:var(--s1)}svg path.s2{stroke:var(--s2)}
svg path.s3{stroke:var(--s3)}svg path.s4{stroke:var(--s4)}svg path.s5{stroke:var(--s5)}
circle.s0,rect.s0,.legend .s0{fill:var(--s0);background:var(--s0)}
circle.s1,.legend .s1{fill:var(--s1);background:var(--s1)}
circle.s2,.legend .s2{fill:var(--s2);background:var(--s2)}circle.s3,.legend .s3{fill:var(--s3);background:var(--s3)}
circle.s4,.legend .s4{fill:var(--s4);background:var(--s4)}circle.s5,.legend .s5{fill:var(--s5);background:var(--s5)}
svg .hit{fill:transparent}svg .hit:hover{fill:var(--ink);fill-opacity:.07}
svg .bar:hover{fill-opacity:.75}
svg .span{stroke-width:1}svg .span.good{fill:var(--good-bg);stroke:var(--good)}
svg .span.warn{fill:var(--warn-bg);stroke:var(--warn)}
svg .span.bad{fill:var(--bad-bg);stroke:var(--bad)}svg .span.calm{fill:var(--calm-bg);stroke:var(--calm)}
svg .point{fill:var(--ink);stroke:var(--card);stroke-width:1.5}svg .speck{fill:var(--soft)}
""".strip()

_TABLES = """
table{border-collapse:collapse;width:100%;font-size:13.5px}
th{font-weight:600;text-align:left;color:var(--soft);font-size:12.5px;border-bottom:1px solid var(--line);
padding:4px 12px 4px 0;white-space:nowrap}
td{border-bottom:1px solid var(--grid);padding:5px 12px 5px 0;vertical-align:top;overflow-wrap:anywhere}
tr:last-child td{border-bottom:0}
.num{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td.mono,code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:12.5px}
pre{background:var(--code);border-radius:8px;padding:12px 14px;overflow-x:auto;margin:0;line-height:1.45}
.meter{display:inline-block;width:90px;height:8px;border-radius:4px;background:var(--grid);overflow:hidden;
vertical-align:1px;margin-right:8px}
.meter i{display:block;height:100%;background:var(--s0)}
.tok{display:inline-block;padding:0 4px;margin:1px 1px;border-radius:4px;background:var(--code)}
.tok.sub{background:var(--bad-bg);color:var(--bad);font-weight:600}
.tok.ins{background:var(--warn-bg);color:var(--warn);font-weight:600}
.tok.del{background:none;color:var(--bad);text-decoration:line-through;outline:1px dashed var(--bad);
outline-offset:-1px}
.ok{color:var(--good)}.no{color:var(--bad)}
details{margin-top:8px}summary{cursor:pointer;color:var(--soft);font-size:13.5px}
details[open] summary{margin-bottom:8px}
.none{color:var(--faint);font-size:13.5px}
footer{margin-top:36px;color:var(--faint);font-size:12.5px}
@media print{body{background:#fff}.card,.tile{break-inside:avoid}main{max-width:none;padding:0}}
""".strip()

_FONT = 'font:11px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif'

STYLE = "\n".join([_COLOURS, _PAGE, f"svg{{display:block;width:100%;height:auto;{_FONT}}}", _MARKS, _TABLES])
"""Of the report: a page with pictures in it."""

PICTURE_STYLE = "\n".join(
    [
        _COLOURS,
        f"svg{{{_FONT}}}",
        ".page{fill:var(--card)}svg .title{font-size:14px;font-weight:600;fill:var(--ink)}",
        _MARKS,
        "svg .mark{stroke:var(--ink)}",
    ]
)
"""Of a picture that stands alone in a file."""

"""How the report looks: one style sheet for light and dark."""

from __future__ import annotations

__all__ = ["STYLE"]

STYLE = """
:root{--paper:#fbfaf8;--card:#fff;--ink:#1d2330;--soft:#5c6475;--faint:#e6e4df;--curve-0:#3557d6;--curve-1:#c8622b;
--good:#e6f4ea;--good-ink:#1b6b3a;--bad:#fbeaea;--bad-ink:#9b2c2c}
@media (prefers-color-scheme:dark){:root{--paper:#14161b;--card:#1c1f26;--ink:#e7e9ee;--soft:#9aa2b1;--faint:#2d323c;
--curve-0:#86a5ff;--curve-1:#f0a065;--good:#17301f;--good-ink:#8fd6a8;--bad:#3a1f21;--bad-ink:#f0a3a3}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1340px;margin:0 auto;padding:40px 24px 64px}
.eyebrow{margin:0;color:var(--soft);font-size:13px;letter-spacing:.08em;text-transform:uppercase}
h1{margin:0 0 24px;font-size:30px;line-height:1.2;overflow-wrap:anywhere}
h2{display:inline-block;margin:40px 0 12px;font-size:19px}
h3{margin:0 0 6px;font-size:14px;color:var(--soft)}
.tiles{display:flex;flex-wrap:wrap;gap:14px;margin:0 0 28px}
.tiles div{flex:1 1 150px;background:var(--card);border:1px solid var(--faint);border-radius:10px;padding:14px 16px}
dt{color:var(--soft);font-size:13px}
dd{margin:2px 0 0;font-size:21px;font-weight:600;font-variant-numeric:tabular-nums;white-space:nowrap}
dd i{font-style:normal;font-weight:400;font-size:14px;color:var(--soft)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr));gap:18px}
figure{margin:0;background:var(--card);border:1px solid var(--faint);border-radius:10px;padding:14px 14px 8px}
figcaption{display:flex;justify-content:space-between;padding:0 4px 6px}
figcaption span{color:var(--soft);font-variant-numeric:tabular-nums}
svg{display:block;width:100%;height:auto}
svg text{font:11px system-ui,sans-serif;fill:var(--soft);font-variant-numeric:tabular-nums}
svg .empty{font-size:14px}
.grid{stroke:var(--faint);stroke-width:1}
.axis{stroke:var(--soft);stroke-width:1}
.curve{fill:none;stroke:var(--curve);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.raw{fill:none;stroke:var(--curve);stroke-width:1;opacity:.3;stroke-linejoin:round}
.dot{fill:var(--curve)}
.scroll{overflow-x:auto;border:1px solid var(--faint);border-radius:10px;background:var(--card)}
table{border-collapse:collapse;width:100%;font-size:14px}
th{text-align:left;font-weight:600;color:var(--soft);white-space:nowrap}
th,td{padding:8px 12px;border-bottom:1px solid var(--faint);vertical-align:top}
tbody tr:last-child td{border-bottom:0}
code{font:13px/1.45 ui-monospace,"SF Mono",Menlo,Consolas,monospace;white-space:pre-wrap;overflow-wrap:anywhere}
p.note{margin:12px 2px 0;color:var(--soft);font-size:13px}
small{display:block;opacity:.75;font-size:12px}
.good{background:var(--good);color:var(--good-ink)}
.bad{background:var(--bad);color:var(--bad-ink)}
summary{cursor:pointer}
.settings{columns:3 300px;column-gap:28px}
.settings div{break-inside:avoid;margin-bottom:20px}
.settings td{padding:3px 8px 3px 0}
.settings code{overflow-wrap:break-word}
"""
"""The style sheet."""

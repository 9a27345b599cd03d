"""How the page looks, in light and in dark: its style sheet, which stands in it."""

LIGHT = """
  --paper: #fcfcfb; --card: #fff; --ink: #1c1f23; --soft: #5f6773; --rule: #e2e5e9; --bad: #b3261e;
  --line-0: #2f6fbd; --line-1: #d2691e; --line-2: #2e8b57; --line-3: #8e5bb5; --line-4: #b8860b; --line-5: #c0476d;
"""
DARK = """
  --paper: #15171a; --card: #1d2024; --ink: #e7e9ec; --soft: #9aa3ae; --rule: #343940; --bad: #ff8a80;
  --line-0: #6fa8ea; --line-1: #f0975a; --line-2: #63c08b; --line-3: #bd93e0; --line-4: #d9b048; --line-5: #ec87a6;
"""
CHARTS = """
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); gap: 14px; }
.charts figcaption span { color: var(--soft); font-size: 13px; margin-left: 6px; }
.charts svg { display: block; width: 100%; height: auto; }
.charts .tick { fill: var(--soft); font-size: 11px; }
.charts .grid { stroke: var(--rule); stroke-width: 1; }
.charts .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.charts .faint { opacity: .3; }
.charts .line.faint { stroke-width: 1; }
.charts .mark { stroke-dasharray: 3 3; stroke-width: 1.2; }
.charts .legend {
  list-style: none; display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 6px 0 0; padding: 0; font-size: 12.5px;
  color: var(--soft);
}
.charts .legend b { color: var(--ink); font-weight: 600; }
.charts .legend i { display: inline-block; width: 14px; height: 3px; margin-right: 5px; vertical-align: middle; }
.charts .legend i.dotted { height: 0; border-top: 2px dotted; }
.charts figure { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 12px; margin: 0; }
"""
"""Of charts alone: for other pages that show them, with the colours of LIGHT or DARK."""
_PAGE = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
header, nav, main, footer { max-width: 1180px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 28px; }
h1 { margin: 0; font-size: 28px; overflow-wrap: anywhere; }
h2 { margin: 36px 0 12px; font-size: 20px; }
h3 { margin: 20px 0 8px; font-size: 16px; }
header p { margin: 4px 0 12px; color: var(--soft); }
nav {
  overflow-x: auto; white-space: nowrap; position: sticky; top: 0; z-index: 1;
  background: var(--paper); padding-block: 8px;
  border-bottom: 1px solid var(--rule);
}
nav a { color: var(--soft); margin-right: 16px; text-decoration: none; white-space: nowrap; }
nav a:hover { color: var(--ink); text-decoration: underline; }
section { scroll-margin-top: 40px; }
section h2 { scroll-margin-top: 48px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px; margin-top: 20px; }
.tiles div, figure { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 12px; }
.tiles div { color: var(--soft); font-size: 13px; }
.tiles b { display: block; color: var(--ink); font-size: 22px; font-weight: 600; }
figure { margin: 0; min-width: 0; }
.sheets { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 14px; }
.sheet { max-width: 100%; }
.sheet img { display: block; max-width: 100%; height: auto; image-rendering: auto; border-radius: 4px; }
.sheet figcaption { margin-top: 6px; color: var(--soft); font-size: 13px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; margin-top: 10px; }
th, td {
  text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--rule); vertical-align: top;
  font-variant-numeric: tabular-nums;
}
th { color: var(--soft); font-weight: 500; white-space: nowrap; }
pre {
  overflow-x: auto; background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 12px;
  font-size: 12.5px;
}
.missing { color: var(--bad); }
footer { margin: 36px auto 28px; color: var(--soft); font-size: 13px; }
@media print { nav { display: none; } figure, .tiles div { break-inside: avoid; } }
"""
STYLE = f":root {{{LIGHT}}}\n@media (prefers-color-scheme: dark) {{ :root {{{DARK}}} }}\n{_PAGE}{CHARTS}"

"""The gallery's page: style sheet and frame, without any outside resource and without scripts."""

STYLE = """
:root{--bg:#faf9f5;--card:#fff;--ink:#23231f;--soft:#6d6c64;--line:#e4e2d9;--bark:#96602c;--leaf:#5f9468;--pale:#dfe9dc;
--shadow:0 1px 2px #0000000d,0 4px 14px #0000000a;color-scheme:light dark}
@media (prefers-color-scheme:dark){:root{--bg:#171815;--card:#20211d;--ink:#ebeae2;--soft:#9c9b90;--line:#34352f;--bark:#d09a5f;
--leaf:#86b78d;--pale:#2c3a2d;--shadow:none}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.45 system-ui,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}
main,header,footer{max-width:1460px;margin:0 auto;padding:0 28px}
header{padding-top:40px}
h1{font-size:28px;line-height:1.2;margin:0 0 6px;letter-spacing:-.01em}
h2{font-size:19px;margin:40px 0 4px}
.soft,.meta,footer{color:var(--soft)}
.meta{margin:0;overflow-wrap:anywhere}
.meta b{font-weight:600;color:var(--ink)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(215px,1fr));gap:14px;margin:26px 0 14px}
.tile,.group,.chart{background:var(--card);border:1px solid var(--line);border-radius:12px;box-shadow:var(--shadow)}
.tile{padding:16px 18px}
.tile b{display:block;font-size:30px;line-height:1.15;font-weight:650;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft)}
.tile.main b{color:var(--leaf)}
.chart{padding:16px 18px 12px}
.chart svg{display:block;width:100%;height:120px}
.chart p{margin:0 0 8px}
.key{display:inline-block;width:11px;height:11px;border-radius:3px;margin:0 5px 0 14px;vertical-align:-1px}
.key:first-child{margin-left:0}
.bark{background:var(--bark)}.leaf{background:var(--leaf)}.pale{background:var(--pale);box-shadow:inset 0 0 0 1px var(--leaf)}
.groups{display:flex;flex-wrap:wrap;gap:14px;margin-top:14px}
.group{display:grid;grid-template-columns:160px minmax(0,1fr);overflow:hidden;content-visibility:auto;min-width:0;max-width:100%;
flex:1 1 calc(204px + var(--n)*142px);contain-intrinsic-size:auto none auto 380px}
.about{padding:14px;border-right:1px solid var(--line);font-size:13.5px;color:var(--soft)}
.about h3{margin:0 0 2px;font-size:16px;color:var(--ink)}
.about p{margin:0 0 8px;overflow-wrap:anywhere}
.about .save{color:var(--leaf);font-weight:650}
.bar{height:7px;border-radius:4px;background:var(--pale);display:flex;overflow:hidden;margin:8px 0}
.bar i{display:block;height:100%}
.tree{overflow-x:auto;padding:14px 14px 16px}
.tree svg{display:block;overflow:visible}
.tree svg text{font:11px system-ui,sans-serif;fill:var(--soft);stroke:var(--card);stroke-width:4px;paint-order:stroke}
.tree path{fill:none;stroke-linecap:round;stroke-linejoin:round}
.row{display:flex;gap:10px}
figure{margin:0;width:132px;flex:none}
figure a{display:block;position:relative;text-decoration:none}
figure img{display:block;width:132px;height:132px;object-fit:contain;border-radius:9px;background:var(--line);
outline:1px solid var(--line);outline-offset:-1px}
figure a+a{margin-top:6px}
figure a span{position:absolute;right:6px;top:6px;font-size:10.5px;line-height:1;padding:3px 6px;border-radius:6px;
color:#fff;background:var(--bark)}
.sides{flex:none;width:14px}
.sides span{display:block;height:132px;margin-bottom:6px;writing-mode:vertical-rl;transform:rotate(180deg);text-align:center;
font-size:11px;line-height:14px;color:var(--soft)}
.compared svg{margin-left:24px}
figcaption{font-size:12.5px;line-height:1.35;margin-top:6px;overflow-wrap:anywhere}
figcaption b{font-weight:500;display:-webkit-box;-webkit-line-clamp:4;-webkit-box-orient:vertical;overflow:hidden}
figcaption small{color:var(--soft);font:10.5px ui-monospace,Menlo,Consolas,monospace}
.trunk a:first-child img{outline:3px solid var(--bark);outline-offset:-3px}
.alone{display:grid;grid-template-columns:repeat(auto-fill,132px);gap:18px 12px;margin-top:14px}
.alone figure{content-visibility:auto;contain-intrinsic-size:auto 132px auto 190px}
footer{font-size:13px;padding-top:26px;padding-bottom:44px}
footer a,.meta a{color:inherit}
@media (max-width:720px){main,header,footer{padding-left:14px;padding-right:14px}.group{grid-template-columns:1fr}
.about{border-right:0;border-bottom:1px solid var(--line)}}
@media print{.group{break-inside:avoid;box-shadow:none}}
"""

# The policy forbids every request: pictures and style are in the page.
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
{head}
</header>
<main>
{body}
</main>
<footer>
{foot}
</footer>
</body>
</html>
"""

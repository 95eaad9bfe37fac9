"""The page's CSS: light, and dark where the reader's system is."""

from __future__ import annotations

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1d2228;--dim:#5d6772;--rule:#dde2e8;--soft:#f5f7f9;
--c1:#2a6fc9;--c2:#6b7480;--c3:#c9591a;--c4:#1d8a55;--c5:#8746b8}
@media(prefers-color-scheme:dark){:root{--bg:#15181c;--fg:#e3e7ec;--dim:#98a2ad;--rule:#31373e;--soft:#1d2126;
--c1:#6aa9ff;--c2:#a7b0ba;--c3:#f2904f;--c4:#4fc78b;--c5:#c08cf0}}
*{box-sizing:border-box}
body{margin:0 auto;padding:24px 20px 60px;max-width:1440px;background:var(--bg);color:var(--fg);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:24px;margin:0;overflow-wrap:anywhere}
h2{font-size:19px;margin:36px 0 10px;border-bottom:1px solid var(--rule)}
h3{font-size:15px;margin:18px 0 6px}header p,section>p{color:var(--dim);margin:6px 0;overflow-wrap:anywhere}
.state{color:var(--fg)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(420px,100%),1fr));gap:18px}
figure{margin:0;padding:10px 12px;border:1px solid var(--rule);border-radius:6px}figcaption{font-weight:600}
svg{display:block;width:100%;height:auto}svg text{fill:var(--dim);font-size:11px;font-family:inherit}
svg.bar{height:26px}
.grid{stroke:var(--rule);stroke-width:1}.line{fill:none;stroke-width:1.8;stroke-linejoin:round}
.dashed{stroke-dasharray:5 4;opacity:.75}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;margin:3px 0;color:var(--dim);font-size:12.5px}
.legend i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:5px}
polyline.s1{stroke:var(--c1)}polyline.s2{stroke:var(--c2)}polyline.s3{stroke:var(--c3)}
polyline.s4{stroke:var(--c4)}polyline.s5{stroke:var(--c5)}
circle.s1,rect.s1{fill:var(--c1)}circle.s2,rect.s2{fill:var(--c2)}circle.s3,rect.s3{fill:var(--c3)}
circle.s4,rect.s4{fill:var(--c4)}circle.s5,rect.s5{fill:var(--c5)}
i.s1{background:var(--c1)}i.s2{background:var(--c2)}i.s3{background:var(--c3)}i.s4{background:var(--c4)}
i.s5{background:var(--c5)}
.wide{overflow-x:auto}table{border-collapse:collapse;margin:6px 0}
th,td{padding:4px 14px 4px 0;border-bottom:1px solid var(--rule);text-align:left;vertical-align:top}
th{color:var(--dim);font-weight:600}
.numbers td:not(:first-child),.numbers th:not(:first-child){text-align:right;font-variant-numeric:tabular-nums}
.texts{width:100%}.texts td{white-space:pre-wrap;overflow-wrap:anywhere;min-width:110px;
font:13px/1.45 ui-monospace,SFMono-Regular,Menlo,monospace}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 18px;margin:0}dt{color:var(--dim)}
dd{margin:0;overflow-wrap:anywhere}
pre{background:var(--soft);border:1px solid var(--rule);border-radius:6px;padding:12px;overflow-x:auto;
font:13px/1.45 ui-monospace,SFMono-Regular,Menlo,monospace}
@media(max-width:600px){dl{grid-template-columns:1fr}dt{margin-top:6px}}
"""

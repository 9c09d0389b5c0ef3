"""The frame of the report: style and the few lines of script, all inside the one file."""

from __future__ import annotations

from html import escape

STYLE = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#16202c;--soft:#566270;--rule:#dfe4ea;
--s0:#2458d3;--s1:#b4510b;--s2:#0b7a5b;--s3:#8b3fae;--good:#0b6b43;--goodbg:#e0f4ea;
--bad:#a61b2b;--badbg:#fde7e9;--accent:#2458d3}
@media(prefers-color-scheme:dark){:root{--bg:#0f141a;--card:#171e27;--ink:#e8edf3;--soft:#9fadbd;
--rule:#2b3643;--s0:#7ba7ff;--s1:#ffa45c;--s2:#4fd0a4;--s3:#d39bf2;--good:#67d9a3;--goodbg:#12352a;
--bad:#ff8f9b;--badbg:#41191f;--accent:#7ba7ff}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,
"Segoe UI",Roboto,"Noto Sans",sans-serif}
main,header{max-width:1120px;margin:0 auto;padding:0 20px}
header{padding-top:36px}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 6px;letter-spacing:-.015em;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:0 0 12px}
.meta{display:flex;flex-wrap:wrap;gap:4px 22px;margin:0 0 8px;padding:0;color:var(--soft);
font-size:.9rem}
.meta div{display:flex;gap:6px;min-width:0}.meta dt{margin:0}.meta dd{margin:0;color:var(--ink);
overflow-wrap:anywhere}
section{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:20px 22px;
margin:18px 0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:12px;margin:18px 0}
.tile{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:14px 18px}
.tile b{display:block;font-size:2rem;line-height:1.15;font-variant-numeric:tabular-nums;
letter-spacing:-.02em}
.tile span{color:var(--soft);font-size:.88rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.95rem;font-variant-numeric:tabular-nums}
th,td{padding:7px 10px;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap}
thead th{font-weight:600;color:var(--soft);font-size:.82rem}
th:first-child,td:first-child,th.l,td.l{text-align:left}
tbody th{font-weight:600}tr.group th,tr.group td{color:var(--soft);font-weight:400;
font-size:.92rem;padding-top:4px;padding-bottom:4px}tr.group th{padding-left:28px}
td.main{font-weight:650;color:var(--ink)}
.meter{display:inline-block;width:56px;height:8px;border-radius:4px;background:var(--rule);
vertical-align:middle;margin-left:8px;overflow:hidden}
.meter i{display:block;height:100%;background:var(--s0)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:18px}
.charts section{margin:0;min-width:0}
.chart{width:100%;height:auto;display:block;overflow:visible}
.chart text{fill:var(--soft);font:13px system-ui,sans-serif}.chart .value{fill:var(--ink);
font-weight:600;paint-order:stroke;stroke:var(--card);stroke-width:4px}
.grid{stroke:var(--rule)}.reference{stroke:var(--soft);stroke-dasharray:5 5}
.line{fill:none;stroke-width:2.2}.bar{stroke-width:1.5;opacity:.55}
.s0{stroke:var(--s0)}.s1{stroke:var(--s1)}.s2{stroke:var(--s2)}.s3{stroke:var(--s3)}
.mark{stroke:var(--card);stroke-width:1.5}.mark.s0{fill:var(--s0)}.mark.s1{fill:var(--s1)}
.mark.s2{fill:var(--s2)}.mark.s3{fill:var(--s3)}
.hit{fill:transparent;stroke:none}.dot{opacity:0;fill:var(--card);stroke-width:2}
.point:hover .dot{opacity:1}.point:focus{outline:none}
.point:focus-visible .hit{stroke:var(--accent);stroke-width:2}
.charts .chart{max-width:640px}.charts .chart text{font-size:17px}
.legend{display:flex;flex-wrap:wrap;gap:2px 18px;list-style:none;margin:6px 0 0;padding:0;
font-size:.88rem}.legend svg{vertical-align:-2px;margin-right:5px}
#tip{position:fixed;pointer-events:none;background:var(--ink);color:var(--card);padding:5px 10px;
border-radius:6px;font-size:.85rem;max-width:260px;z-index:9;white-space:pre-line}
.filters{display:flex;flex-wrap:wrap;gap:10px 22px;margin:0 0 16px;align-items:center}
fieldset{border:0;padding:0;margin:0;display:flex;flex-wrap:wrap;gap:6px;align-items:center}
legend{float:left;padding:0;margin-right:8px;color:var(--soft);font-size:.88rem}
.filters label{position:relative}
.filters input{position:absolute;opacity:0;inset:0;margin:0;cursor:pointer}
.filters label span{display:block;border:1px solid var(--rule);border-radius:999px;
padding:3px 13px;font-size:.9rem}
.filters input:checked+span{background:var(--accent);border-color:var(--accent);color:var(--card)}
.filters input:focus-visible+span{outline:2px solid var(--accent);outline-offset:2px}
#shown{color:var(--soft);font-size:.88rem;margin-left:auto}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(210px,1fr));gap:14px;
list-style:none;margin:0;padding:0}
.card{border:1px solid var(--rule);border-radius:10px;overflow:hidden;display:flex;
flex-direction:column;min-width:0}
.card[hidden]{display:none}
.frame{background:#0b0f14;aspect-ratio:1;display:grid;gap:2px;align-items:center;
grid-template-columns:repeat(var(--columns,1),minmax(0,1fr));grid-auto-rows:minmax(0,1fr)}
.frame img{width:100%;height:100%;object-fit:contain}
.frame img.tiny{image-rendering:pixelated}
.card .body{padding:10px 12px 12px;font-size:.9rem;overflow-wrap:anywhere}
.card p{margin:0 0 7px}.card dl{margin:0;display:grid;grid-template-columns:auto 1fr;gap:1px 10px}
.card dt{color:var(--soft)}.card dd{margin:0;font-weight:600}
.card p,.card dd,.meta dd{white-space:pre-line}
.verdict{display:inline-block;border-radius:6px;padding:1px 8px;font-size:.8rem;font-weight:650}
.right .verdict{color:var(--good);background:var(--goodbg)}
.wrong .verdict{color:var(--bad);background:var(--badbg)}
.wrong{border-style:dashed;border-color:var(--bad)}
.where{float:right;color:var(--soft);font-size:.8rem}
.note{color:var(--soft);font-size:.88rem;margin:12px 0 0}
footer{max-width:1120px;margin:0 auto;padding:4px 20px 40px;color:var(--soft);font-size:.85rem}
@media(max-width:560px){section{padding:16px 14px}.meter{display:none}th,td{padding:6px 5px}
table{font-size:.85rem}.charts section{overflow-x:auto}.charts .chart{min-width:400px}
.charts .chart text{font-size:18px}
.tiles{grid-template-columns:1fr 1fr}
.tile{padding:10px 12px}.tile b{font-size:1.5rem}.card dl{grid-template-columns:1fr}
.gallery{grid-template-columns:repeat(2,minmax(0,1fr));gap:10px}
h1{font-size:1.5rem}header{padding-top:22px}#shown{margin-left:0}}
@media print{.filters{display:none}section{break-inside:avoid}}
"""

SCRIPT = """
(()=>{const tip=document.getElementById('tip');
const show=(t,x,y)=>{tip.textContent=t;tip.hidden=false;const w=tip.offsetWidth;
tip.style.left=Math.max(4,Math.min(x+14,innerWidth-w-8))+'px';tip.style.top=Math.max(4,y-40)+'px'};
for(const p of document.querySelectorAll('[data-tip]')){
p.addEventListener('pointermove',e=>show(p.dataset.tip,e.clientX,e.clientY));
p.addEventListener('pointerleave',()=>tip.hidden=true);
p.addEventListener('focus',()=>{const r=p.getBoundingClientRect();
show(p.dataset.tip,r.right,r.top)});
p.addEventListener('blur',()=>tip.hidden=true)}
const form=document.getElementById('filters');if(!form)return;
const cards=[...document.querySelectorAll('.card')],count=document.getElementById('shown');
const apply=()=>{const want=new FormData(form);let n=0;
for(const c of cards){const on=['verdict','task','at'].every(k=>{const v=want.get(k);
return !v||c.dataset[k]===v});c.hidden=!on;n+=on}
count.textContent=n+' of '+cards.length+' questions'};
form.addEventListener('change',apply);form.hidden=false;apply()})();
"""


def page(title: str, header: str, body: str, footer: str) -> str:
    """Put the parts together to one HTML file that needs nothing from outside."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<header>{header}</header>
<main>
{body}
</main>
<footer>{footer}</footer>
<div id="tip" role="status" hidden></div>
<script>{SCRIPT}</script>
</body>
</html>
"""


def filters(groups: dict[str, tuple[str, list[tuple[str, str]]]]) -> str:
    """Write the filter bar: name -> (title, [(value, label), ...]); the empty value shows all."""
    parts = []
    for name, (title, options) in groups.items():
        labels = "".join(
            f'<label><input type="radio" name="{escape(name)}" value="{escape(value)}"'
            f"{' checked' if i == 0 else ''}><span>{escape(label)}</span></label>"
            for i, (value, label) in enumerate(options)
        )
        parts.append(f"<fieldset><legend>{escape(title)}</legend>{labels}</fieldset>")
    inner = "".join(parts)
    live = '<span id="shown" role="status"></span>'
    return f'<form id="filters" class="filters" hidden>{inner}{live}</form>'

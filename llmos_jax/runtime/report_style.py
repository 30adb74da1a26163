"""The frame of `report.html`: its markup, its style and the read-out under the pointer. Filled with `str.format`."""

_STYLE = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1220px;margin:0 auto;padding:32px 24px 64px}
h1{font-size:26px;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:17px;margin:36px 0 10px}
.sub{margin:0;color:var(--ink-2);font-size:13.5px;overflow-wrap:anywhere}
.mono,td,pre{font-variant-numeric:tabular-nums}
.mono{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:12.5px}
.state{display:inline-block;vertical-align:3px;margin-left:8px;padding:1px 10px;border:1px solid currentColor;
border-radius:99px;font-size:12.5px;font-weight:500}
.state.done{color:var(--good)}.state.open{color:var(--warn)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(132px,1fr));gap:12px;margin:22px 0 8px}
.tile,figure,article,.pairs,.scroll{background:var(--surface);border:1px solid var(--grid);border-radius:10px}
.tile{padding:11px 14px}.tile span,.tile small{display:block;color:var(--ink-2);font-size:12.5px}
.tile small{min-height:1.5em}.tile b{font-size:22px;font-weight:600;line-height:1.3}
.legend i,.events i{font-style:normal;font-size:12.5px;color:var(--ink-2);margin-left:14px;white-space:nowrap}
.legend i:before,.events i:before{content:"";display:inline-block;width:12px;height:3px;border-radius:2px;
background:var(--c);margin-right:6px;vertical-align:middle}
.events i{margin:0;color:var(--ink)}.events i:before{width:8px;height:8px;border-radius:50%}
.marks{margin:14px 0 -4px -14px}.marks .line:before{width:0;height:13px;border-left:2px dashed var(--c);
background:none;border-radius:0}.marks .tick:before{width:2px;height:7px}
.charts{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:14px;margin-top:14px}
figure{margin:0;padding:12px 14px 8px;min-width:0}.wide{grid-column:1/-1}
figcaption{font-weight:600;font-size:14px;display:flex;align-items:baseline;gap:6px;flex-wrap:wrap}
figcaption small{font-weight:400;color:var(--ink-2);font-size:12.5px}
figcaption .legend{margin-left:auto;font-weight:400}
.plot{position:relative}.chart{display:block;width:100%;height:auto;margin-top:4px}
output{position:absolute;top:4px;pointer-events:none;display:none;background:var(--surface);
border:1px solid var(--axis);border-radius:7px;padding:4px 9px;font-size:12.5px;line-height:1.45;white-space:nowrap;
font-variant-numeric:tabular-nums;box-shadow:0 2px 8px #0002}
output b{display:block;font-weight:500;color:var(--ink-2)}
output i{font-style:normal}output i:before{content:"";display:inline-block;width:8px;height:8px;border-radius:50%;
background:var(--c);margin-right:6px}
.scroll{overflow:auto;max-height:440px}table{border-collapse:collapse;font-size:13.5px}
.events{width:100%}.events th,.events td{text-align:left;padding:5px 14px;border-bottom:1px solid var(--grid)}
.events thead th{position:sticky;top:0;background:var(--surface);color:var(--ink-2);font-weight:500;font-size:12.5px}
.events .num{text-align:right;width:1%}.events td:nth-child(2),.events td:nth-child(3){white-space:nowrap;width:1%}
.events tr:last-child td{border-bottom:0}
.samples{display:grid;gap:12px;grid-template-columns:repeat(auto-fill,minmax(min(100%,420px),1fr))}
article{padding:12px 16px}article small{color:var(--ink-2)}
article p{margin:2px 0 0;white-space:pre-wrap;overflow-wrap:anywhere;max-height:260px;overflow:auto}
.tables{columns:3 340px;column-gap:14px}
.pairs{margin:0 0 14px;padding:9px 14px;break-inside:avoid}.pairs h3{font-size:14px;margin:0 0 4px}
.pairs table{width:100%;table-layout:fixed}
.pairs th{text-align:left;font-weight:400;color:var(--ink-2);padding:1px 8px 1px 0;vertical-align:top;width:52%;
overflow-wrap:anywhere}
.pairs td{padding:1px 0;vertical-align:top;overflow-wrap:anywhere}
.empty{padding:48px;text-align:center;color:var(--ink-2);border:1px dashed var(--axis);border-radius:10px}
@media(max-width:760px){main{padding:20px 14px 40px}.charts{grid-template-columns:minmax(0,1fr)}
.wide .plot{overflow-x:auto}.wide .chart{min-width:680px}}
@media print{.scroll{max-height:none}figure,article,.tile{break-inside:avoid}}
"""

# The read-out: the nearest point of each line under the pointer, and a cursor at that step in every chart.
_SCRIPT = """
const figures=[...document.querySelectorAll("figure")].map(f=>({plot:f.querySelector(".plot"),
svg:f.querySelector("svg"),out:f.querySelector("output"),cursor:f.querySelector(".cursor"),
lines:JSON.parse(f.querySelector("script").textContent)}));
function nearest(p,v,k){let a=0,b=p.length-1;while(b-a>1){const m=(a+b)>>1;if(p[m][k]<v)a=m;else b=m}
return Math.abs(p[a][k]-v)<=Math.abs(p[b][k]-v)?p[a]:p[b]}
function point(f,step,show){const near=f.lines.filter(l=>l[2].length).map(l=>[l,nearest(l[2],step,1)]);
if(!near.length)return;
let best=near[0][1];for(const [,p] of near)if(Math.abs(p[1]-step)<Math.abs(best[1]-step))best=p;
f.cursor.setAttribute("x1",best[0]);f.cursor.setAttribute("x2",best[0]);f.cursor.setAttribute("visibility","visible");
if(!show){f.out.style.display="none";return}
f.out.replaceChildren();const head=document.createElement("b");head.textContent="step "+best[1].toLocaleString("en");
f.out.append(head);
for(const [l,p] of near){const row=document.createElement("i");row.style.setProperty("--c","var("+l[1]+")");
row.textContent=l[0]+" "+p[2]+(p[1]===best[1]?"":" (step "+p[1].toLocaleString("en")+")");
f.out.append(row,document.createElement("br"))}
f.out.style.display="block";const w=f.svg.clientWidth,at=best[0]/f.svg.viewBox.baseVal.width*w;
f.out.style.left=(at+14+f.out.offsetWidth<w?at+14:Math.max(0,at-14-f.out.offsetWidth))+"px"}
for(const f of figures){f.plot.addEventListener("pointermove",e=>{const box=f.svg.getBoundingClientRect(),
x=(e.clientX-box.left)/box.width*f.svg.viewBox.baseVal.width;let best=null;
for(const l of f.lines)if(l[2].length){const p=nearest(l[2],x,0);
if(!best||Math.abs(p[0]-x)<Math.abs(best[0]-x))best=p}
if(best)for(const g of figures)point(g,best[1],g===f)});
f.plot.addEventListener("pointerleave",()=>{for(const g of figures){g.out.style.display="none";
g.cursor.setAttribute("visibility","hidden")}})}
"""


def _braces(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


PAGE = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
    '<meta name="viewport" content="width=device-width,initial-scale=1"><style>{theme}'
    + _braces(_STYLE)
    + '</style></head><body><main><header>{header}</header><div class="tiles">{tiles}</div>{charts}'
    "{events}{samples}{summary}{config}</main><script>" + _braces(_SCRIPT) + "</script></body></html>\n"
)

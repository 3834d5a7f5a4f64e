"use strict";
// Tells the values of the curves under the pointer, read off the drawing. The page says the same without it.
for (const chart of document.querySelectorAll("svg.chart")) {
  const s = chart.dataset.scales.split(" ").map(Number), figure = chart.closest("figure");
  const value = (at, [low, high, begin, end, log]) => {
    const share = (at - begin) / (end - begin);
    return log ? low * Math.pow(high / low, share) : low + share * (high - low);
  };
  const curves = [...chart.querySelectorAll(".curve[data-name]")].map(path => ({
    name: path.dataset.name,
    points: path.getAttribute("d").slice(1).split(/[ML]/).map(point => point.split(" ").map(Number)),
  }));
  if (!curves.length) continue;
  const mark = document.createElementNS("http://www.w3.org/2000/svg", "line");
  mark.setAttribute("class", "mark");
  mark.setAttribute("y1", s[8]);
  mark.setAttribute("y2", s[7]);
  const tip = document.createElement("div");
  tip.className = "tip";
  const text = number => Number(number.toPrecision(4)).toLocaleString("en", { maximumSignificantDigits: 4 });
  chart.addEventListener("pointermove", event => {
    const box = chart.getBoundingClientRect(), scale = chart.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * scale;
    const nearest = points => points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
    const all = curves.map(curve => ({ name: curve.name, at: nearest(curve.points) }));
    const at = nearest(all.map(one => one.at))[0];
    const lines = [`${chart.dataset.x} ${Math.round(value(at, s.slice(0, 5))).toLocaleString("en")}`];
    for (const one of all)
      if (Math.abs(one.at[0] - at) < 6 || curves.length === 1) lines.push(`${one.name}: ${text(value(one.at[1], s.slice(5)))}`);
    tip.replaceChildren(...lines.flatMap((line, i) => (i ? [document.createElement("br"), line] : [line])));
    mark.setAttribute("x1", at);
    mark.setAttribute("x2", at);
    chart.append(mark);
    figure.append(tip);
    const home = figure.getBoundingClientRect(), left = box.left - home.left + at / scale;
    tip.style.top = `${box.top - home.top + 8}px`;
    tip.style.left = `${left + 12 + tip.offsetWidth > home.width ? Math.max(0, left - 12 - tip.offsetWidth) : left + 12}px`;
  });
  chart.addEventListener("pointerleave", () => { mark.remove(); tip.remove(); });
}

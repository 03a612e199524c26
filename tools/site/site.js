// Search, sorting and filtering. The pages read without it; nothing is fetched: the index is a script of its own.
"use strict";
(() => {
  const root = document.documentElement.dataset.root;
  const make = (tag, props = {}, ...children) => { const e = Object.assign(document.createElement(tag), props); e.append(...children); return e; };

  // --- search: every word must occur; a hit in a title counts more than one in a heading, and that more than one in the text
  const form = document.querySelector(".search"), box = form.querySelector("input"), list = form.querySelector("ol");
  let wanted = null;
  const index = () => wanted ??= new Promise(done => document.head.append(make("script", {src: root + "search-index.js", onload: () => done(window.SITE_INDEX)})));
  const words = text => text.toLowerCase().split(/\s+/).filter(Boolean);
  const begins = (text, word) => new RegExp("(^|[^\\p{L}\\p{N}])" + word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"), "u").test(text);

  function score(entry, ws) {
    const parts = entry.lower ??= [entry[1], entry[2], entry[3]].map(s => s.toLowerCase());
    let sum = 0;
    for (const w of ws) {
      const found = parts.map((p, i) => p.includes(w) ? [9, 5, 1][i] * (p === w ? 4 : begins(p, w) ? 2 : 1) : 0);
      const best = Math.max(...found);
      if (!best) return 0;
      sum += best;
    }
    return sum;
  }

  function snippet(text, ws) {
    const at = Math.max(0, ...ws.map(w => text.toLowerCase().indexOf(w)));
    const from = Math.max(0, at - 60), cut = (from ? "… " : "") + text.slice(from, from + 170) + (text.length > from + 170 ? " …" : "");
    const out = make("small"), low = cut.toLowerCase();
    for (let i = 0; i < cut.length;) {
      const next = ws.map(w => [low.indexOf(w, i), w.length]).filter(x => x[0] >= 0).sort((a, b) => a[0] - b[0])[0];
      if (!next) { out.append(cut.slice(i)); break; }
      out.append(cut.slice(i, next[0]), make("mark", {textContent: cut.slice(next[0], next[0] + next[1])}));
      i = next[0] + next[1];
    }
    return out;
  }

  async function search() {
    const ws = words(box.value);
    if (!ws.length) { list.hidden = true; return; }
    const hits = (await index()).map(e => [score(e, ws), e]).filter(h => h[0]).sort((a, b) => b[0] - a[0]).slice(0, 25);
    list.replaceChildren(...hits.map(([, [url, title, heading, text]]) =>
      make("li", {}, make("a", {href: root + url}, make("b", {textContent: title}), heading ? " · " + heading : "", snippet(text, ws)))));
    if (!hits.length) list.append(make("li", {className: "none", textContent: "Nothing found"}));
    list.hidden = false;
  }
  form.hidden = false;
  box.addEventListener("focus", index, {once: true});
  box.addEventListener("input", search);
  form.addEventListener("submit", e => { e.preventDefault(); list.querySelector("a")?.click(); });
  form.addEventListener("keydown", e => {
    if (e.key === "Escape") { list.hidden = true; box.blur(); }
    const links = [box, ...list.querySelectorAll("a")], at = links.indexOf(document.activeElement);
    const step = {ArrowDown: 1, ArrowUp: -1}[e.key];
    if (step && links[at + step]) { e.preventDefault(); links[at + step].focus(); }
  });
  document.addEventListener("click", e => { if (!form.contains(e.target)) list.hidden = true; });

  // --- tables: rows whose first cell is empty belong to the row above and stay with it
  function groups(body) {
    const out = [];
    for (const row of body.rows) {
      if (out.length && !row.cells[0]?.textContent.trim()) out.at(-1).push(row); else out.push([row]);
    }
    return out;
  }
  const value = (group, column) => group[0].cells[column]?.textContent.trim() ?? "";
  const number = text => { const m = text.replaceAll("−", "-").replaceAll(",", "").match(/^[^\d.+-]*([+-]?\d*\.?\d+(?:e[+-]?\d+)?)/i); return m ? parseFloat(m[1]) : NaN; };

  function sortable(table) {
    const body = table.tBodies[0], original = groups(body), heads = [...table.tHead.rows].at(-1).cells;
    [...heads].forEach((th, column) => {
      if (!th.textContent.trim()) return;
      const button = make("button", {type: "button", className: "sorter", title: "Sort"}, ...th.childNodes);
      th.append(button);
      button.addEventListener("click", () => {
        const now = th.getAttribute("aria-sort"), next = now === "ascending" ? "descending" : now === "descending" ? null : "ascending";
        for (const other of heads) other.removeAttribute("aria-sort");
        let order = original;
        if (next) {
          th.setAttribute("aria-sort", next);
          const filled = original.filter(g => !["", "–", "-"].includes(value(g, column))), empty = original.filter(g => !filled.includes(g));
          const numeric = filled.length && filled.every(g => !isNaN(number(value(g, column))));
          const compare = (a, b) => numeric ? number(value(a, column)) - number(value(b, column)) : value(a, column).localeCompare(value(b, column), "en", {numeric: true});
          order = [...filled.sort(next === "ascending" ? compare : (a, b) => compare(b, a)), ...empty];
        }
        body.append(...order.flat());
      });
    });
  }

  function filterable(table) {
    const rows = groups(table.tBodies[0]), heads = [...[...table.tHead.rows].at(-1).cells].map(c => c.textContent.trim().toLowerCase());
    const text = make("input", {type: "search", placeholder: "Filter rows"}), count = make("span"), bar = make("div", {className: "filter"}, text);
    text.setAttribute("aria-label", "Filter the rows of this table");
    const verdict = heads.indexOf("verdict"), kind = g => value(g, verdict).replace(/ \(.*/s, "");
    const choice = make("select", {}, make("option", {value: "", textContent: "every verdict"}));
    choice.setAttribute("aria-label", "Verdict");
    if (verdict >= 0) {
      for (const v of [...new Set(rows.map(kind))].filter(Boolean).sort()) choice.append(make("option", {value: v, textContent: v}));
      bar.append(choice);
    }
    bar.append(count);
    const apply = () => {
      const ws = words(text.value);
      let shown = 0;
      for (const g of rows) {
        const all = g.map(r => r.textContent).join(" ").toLowerCase(), fits = ws.every(w => all.includes(w)) && (!choice.value || kind(g) === choice.value);
        for (const r of g) r.hidden = !fits;
        shown += fits ? 1 : 0;
      }
      count.textContent = `${shown} of ${rows.length}`;
    };
    text.addEventListener("input", apply);
    choice.addEventListener("change", apply);
    apply();
    let place = table.parentElement;
    while (place.parentElement.closest(".box, .html")) place = place.parentElement.closest(".box, .html");
    place.before(bar);
  }
  document.querySelectorAll("table[data-sort]").forEach(sortable);
  document.querySelectorAll("table[data-filter]").forEach(filterable);
})();

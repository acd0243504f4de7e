// Sorting, tips, tabs and the choice of a layer. The page is whole without it.
'use strict';
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const tip = document.getElementById('tip');
  const said = document.getElementById('said');

  // --- Tips -----------------------------------------------------------------
  function show(text, x, y) {
    tip.textContent = text;
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    const left = Math.min(x + 14, innerWidth - width - 6);
    const above = y + 18 + height > innerHeight;
    tip.style.left = `${Math.max(6, left)}px`;
    tip.style.top = `${Math.max(6, above ? y - height - 12 : y + 18)}px`;
  }

  function hide() {
    tip.hidden = true;
    all('.cursor').forEach((cursor) => cursor.setAttribute('visibility', 'hidden'));
  }

  addEventListener('keydown', (event) => { if (event.key === 'Escape') hide(); });
  addEventListener('scroll', hide, { passive: true, capture: true });

  for (const row of all('[data-tip]')) {
    const text = row.dataset.tip;
    row.addEventListener('pointermove', (event) => show(text, event.clientX, event.clientY));
    row.addEventListener('pointerleave', hide);
    row.addEventListener('focusin', (event) => {
      if (!event.target.matches(':focus-visible')) return;
      const box = event.target.getBoundingClientRect();
      show(text, box.left, box.bottom - 8);
      said.textContent = text;
    });
    row.addEventListener('focusout', hide);
  }

  // --- Charts: the nearest value to the pointer, or the next by the keys ------
  for (const svg of all('svg[data-tips]')) {
    const tips = JSON.parse(svg.dataset.tips);
    const cursor = svg.querySelector('.cursor');
    const [width, height] = [svg.viewBox.baseVal.width, svg.viewBox.baseVal.height];
    let chosen = -1;

    function choose(index) {
      chosen = Math.max(0, Math.min(index, tips.length - 1));
      const [x, y, text] = tips[chosen];
      const box = svg.getBoundingClientRect();
      cursor.setAttribute('d', y === null ? `M${x} ${cursor.dataset.top}V${cursor.dataset.bottom}` : `M${x - 9} ${y}a9 9 0 1 0 18 0a9 9 0 1 0 -18 0`);
      cursor.setAttribute('visibility', 'visible');
      show(text, box.left + (x / width) * box.width, box.top + ((y ?? 60) / height) * box.height);
      return text;
    }

    svg.addEventListener('pointermove', (event) => {
      const box = svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * width;
      const y = ((event.clientY - box.top) / box.height) * height;
      const far = (t) => Math.hypot(t[0] - x, t[1] === null ? 0 : t[1] - y);
      let best = 0;
      tips.forEach((t, i) => { if (far(t) < far(tips[best])) best = i; });
      if (tips.length) choose(best);
    });
    svg.addEventListener('pointerleave', hide);
    svg.addEventListener('blur', hide);
    svg.addEventListener('keydown', (event) => {
      const page = Math.max(1, Math.round(tips.length / 10));
      const moves = {
        ArrowRight: chosen + 1, ArrowLeft: chosen < 0 ? tips.length - 1 : chosen - 1,
        PageDown: chosen + page, PageUp: chosen - page, Home: 0, End: tips.length - 1,
      };
      if (!(event.key in moves) || !tips.length) return;
      event.preventDefault();
      said.textContent = choose(moves[event.key]);
    });
  }

  // --- Tables -----------------------------------------------------------------
  function sort(table, column, head) {
    const body = table.tBodies[0];
    const was = head.getAttribute('aria-sort');
    // Numbers are interesting from the largest, names from the first.
    const first = head.dataset.kind === 'number' ? 'descending' : 'ascending';
    const other = first === 'ascending' ? 'descending' : 'ascending';
    const order = was === first ? other : first;
    const text = head.dataset.kind === 'text';
    const value = (row) => row.cells[column].dataset.value;
    const rows = [...body.rows].sort((a, b) => {
      const [u, v] = [value(a), value(b)];
      return text ? u.localeCompare(v) : Number(u) - Number(v);
    });
    if (order === 'descending') rows.reverse();
    body.append(...rows);
    all('thead th', table).forEach((th) => th.removeAttribute('aria-sort'));
    head.setAttribute('aria-sort', order);
    said.textContent = `sorted by ${head.textContent.trim()}, ${order}`;
  }

  for (const table of all('table.sortable')) {
    all('thead th', table).forEach((head, column) => {
      head.firstElementChild.addEventListener('click', () => sort(table, column, head));
    });
  }

  // --- Weights of a layer -------------------------------------------------------
  function chooseLayer(select) {
    all(`[data-grid="${select.dataset.choice}"]`).forEach((grid, i) => {
      grid.classList.toggle('chosen', i === select.selectedIndex);
    });
  }

  for (const select of all('[data-choice]')) {
    select.addEventListener('change', () => chooseLayer(select));
    chooseLayer(select); // browsers keep a choice when a page is loaded again
  }
  for (const button of all('[data-weights]')) {
    button.addEventListener('click', () => {
      const select = document.querySelector(`[data-choice="${button.dataset.weights}"]`);
      select.selectedIndex = Number(button.dataset.index);
      chooseLayer(select);
      hide();
      select.closest('section').scrollIntoView();
      select.focus({ preventScroll: true });
    });
  }

  // --- Tabs ---------------------------------------------------------------------
  const tabs = all('[role=tab]');
  function chooseRun(tab, focus) {
    for (const other of tabs) {
      const on = other === tab;
      other.setAttribute('aria-selected', String(on));
      other.tabIndex = on ? 0 : -1;
      document.getElementById(other.getAttribute('aria-controls')).classList.toggle('chosen', on);
    }
    if (focus) tab.focus();
  }

  tabs.forEach((tab, i) => {
    document.getElementById(tab.getAttribute('aria-controls')).setAttribute('role', 'tabpanel');
    tab.addEventListener('click', () => chooseRun(tab));
    tab.addEventListener('keydown', (event) => {
      const last = tabs.length - 1;
      const moves = { ArrowRight: i === last ? 0 : i + 1, ArrowLeft: i === 0 ? last : i - 1, Home: 0, End: last };
      if (!(event.key in moves)) return;
      event.preventDefault();
      chooseRun(tabs[moves[event.key]], true);
    });
  });
  if (tabs.length) tabs[0].parentElement.hidden = false;

  // A link to a run shows it first.
  function follow() {
    const tab = tabs.find((t) => `#${t.getAttribute('aria-controls')}` === location.hash);
    if (!tab) return;
    chooseRun(tab);
    document.getElementById(tab.getAttribute('aria-controls')).scrollIntoView();
  }
  addEventListener('hashchange', follow);
  follow();
})();

// Keeps the page as it is on the gateway: fetches it again and puts the parts that change in place of the old ones. Draws the
// line under the pointer, and says the numbers there. Without it, the page is reloaded by the browser.
'use strict';
(() => {
  const every = 5000;
  const at = document.getElementById('at'), live = document.querySelector('.live'), button = document.getElementById('pause');
  let paused = false, timer = 0, asking = false;
  const say = (text, off) => { at.textContent = text; live.classList.toggle('off', off); };
  const selected = part => { const s = getSelection(); return s && !s.isCollapsed && s.containsNode(part, true); };

  async function refresh() {
    clearTimeout(timer);
    if (paused || document.hidden || asking) return;
    asking = true;
    try {
      const answer = await fetch('/', { headers: { Accept: 'text/html' }, cache: 'no-store', signal: AbortSignal.timeout(10000) });
      if (!answer.ok) throw new Error(answer.status);
      const next = new DOMParser().parseFromString(await answer.text(), 'text/html');
      for (const part of document.querySelectorAll('[data-live]')) {
        const other = next.getElementById(part.id);
        if (other && part.innerHTML !== other.innerHTML && !selected(part)) part.replaceChildren(...other.childNodes);
      }
      say(next.getElementById('at').textContent, false);
      shown.forEach(point);
    } catch (error) {
      say('not reached since ' + at.textContent.replace(/^not reached since /, ''), true);
    }
    asking = false;
    timer = setTimeout(refresh, every);
  }

  button.hidden = false;
  button.addEventListener('click', () => {
    paused = !paused;
    button.textContent = paused ? 'Resume' : 'Pause';
    button.setAttribute('aria-pressed', paused);
    live.classList.toggle('off', paused);
    if (!paused) refresh(); else clearTimeout(timer);
  });
  document.addEventListener('visibilitychange', refresh);

  // Plots: which slot of each is looked at.
  const shown = new Map();
  const time = seconds => seconds < 60 ? seconds + ' s' : seconds < 3600 ? Math.round(seconds / 60) + ' min' : Math.floor(seconds / 3600) + ' h ' + Math.round(seconds % 3600 / 60) + ' min';
  function point(slot, figure) {
    const svg = figure.querySelector('svg'), text = figure.querySelector('.read');
    const series = JSON.parse(svg.dataset.series), step = +svg.dataset.step, count = series[0][1].length;
    figure.querySelector('.at').setAttribute('transform', slot < 0 ? 'translate(-99)' : 'translate(' + (slot + .5) * 6 + ')');
    if (slot < 0) { text.textContent = ''; return; }
    const ago = (count - 1 - slot) * step;
    text.textContent = (ago ? time(ago) + ' ago: ' : 'now: ') + series.map(([name, all]) => name + ' ' + (all[slot] === null ? '–' : all[slot].toLocaleString('en') + svg.dataset.unit)).join(', ');
  }
  for (const figure of document.querySelectorAll('.plot')) {
    const count = () => JSON.parse(figure.querySelector('svg').dataset.series)[0][1].length;
    const show = slot => { slot < 0 ? shown.delete(figure) : shown.set(figure, slot); point(slot, figure); };
    figure.addEventListener('pointermove', event => {
      const box = figure.querySelector('svg').getBoundingClientRect();
      const slot = Math.floor((event.clientX - box.left) / box.width * count());
      show(slot < 0 || slot >= count() ? -1 : slot);
    });
    figure.addEventListener('pointerleave', () => show(-1));
    figure.addEventListener('blur', () => show(-1));
    figure.addEventListener('keydown', event => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      show(Math.max(0, Math.min(count() - 1, (shown.get(figure) ?? count()) + step)));
    });
    figure.tabIndex = 0;
  }
  timer = setTimeout(refresh, every);
})();

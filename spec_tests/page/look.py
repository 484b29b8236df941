"""How the page looks, and what its buttons do. The colours are told apart without red and green (Okabe and Ito)."""

STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1b1f24; --soft: #59636e; --line: #d1d9e0; --band: #f3f5f7;
  --PASS: #cfe6f7; --on: #0b3c5d; --FAIL: #b34700; --KNOWN: #f5e05a; --black: #1b1f24; --ERROR: #7a2a9e;
  --whole: #0072b2; --most: #7cbbe3; --half: #f2c069; --few: #d55e00; --empty: #e3e8ed; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1317; --text: #e6eaee; --soft: #9aa6b2; --line: #353d46;
  --band: #1a2027; --PASS: #10405f; --on: #cfe6f7; --FAIL: #c65100; --KNOWN: #e0c93c; --ERROR: #9a4cc0;
  --empty: #2b333b; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 1rem; background: var(--page); color: var(--text); font: 1rem/1.45 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 1.75rem 0 .4rem; }
h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
p, ul { margin: 0 0 .6rem; max-width: 70rem; }
nav a { margin-right: 1rem; }
a { color: inherit; overflow-wrap: anywhere; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1rem; padding: 0; list-style: none; font-size: .85rem;
  color: var(--soft); }
.mark { display: inline-block; min-width: 1.9rem; padding: .1rem .4rem; border-radius: .3rem; text-align: center;
  font: 700 .9rem/1.4 ui-monospace, monospace; border: 1px solid transparent; }
.PASS { background: var(--PASS); color: var(--on); }
.FAIL { background: var(--FAIL); color: #fff; }
.ERROR { background: var(--ERROR); color: #fff; }
.KNOWN { background: var(--KNOWN); color: var(--black); }
.UNSUPPORTED, .none { background: none; color: var(--soft); font-weight: 400; }
.decision { font-size: .75rem; border: 1px solid var(--line); border-radius: .3rem; padding: 0 .3rem;
  white-space: nowrap; color: var(--soft); }
button.mark { cursor: pointer; text-decoration: underline; min-height: 1.9rem; }
:focus-visible { outline: 3px solid #2f81f7; outline-offset: 2px; }
fieldset { display: flex; flex-wrap: wrap; gap: .25rem .9rem; margin: 0 0 .75rem; padding: .4rem .8rem;
  border: 1px solid var(--line); border-radius: .4rem; }
label { display: inline-flex; gap: .35rem; align-items: center; min-height: 1.9rem; }
.frame { overflow: auto; max-height: calc(100vh - 1rem); max-height: calc(100dvh - 1rem);
  border: 1px solid var(--line); border-radius: .4rem; }
table { border-collapse: separate; border-spacing: 0; width: 100%; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td { text-align: center; width: 5rem; }
thead th { position: sticky; top: 0; z-index: 2; background: var(--band); vertical-align: bottom; text-align: center; }
thead th small { display: block; font-weight: 400; color: var(--soft); }
th:first-child { position: sticky; left: 0; background: var(--page); text-align: left; font-weight: 400; z-index: 1; }
thead th:first-child { z-index: 3; background: var(--band); font-weight: 700; }
tr.area th, tr.area td, tr.all th, tr.all td { background: var(--band); font-weight: 700; }
#areas th, #areas td { padding: .2rem .4rem; vertical-align: middle; }
#areas td { min-width: 4.6rem; }
#areas th:first-child { white-space: nowrap; font-weight: 600; }
#areas thead th { line-height: 1.2; }
#areas td, tr.area td { white-space: nowrap; }
#areas small { color: var(--soft); font-weight: 400; }
.share { display: block; border-radius: .25rem; font-weight: 700; line-height: 1.35; }
.whole { background: var(--whole); color: #fff; }
.most { background: var(--most); color: var(--black); }
.half { background: var(--half); color: var(--black); }
.few { background: var(--few); color: var(--black); }
.tried { display: block; font-size: .7rem; line-height: 1.25; color: var(--soft); font-weight: 400; }
.bar { display: block; height: .2rem; margin-top: .1rem; background: var(--empty); border-radius: .1rem; }
.bar > span { display: block; height: 100%; background: var(--soft); border-radius: .1rem; }
.untried { color: var(--soft); font-weight: 400; }
.causes { padding: 0; list-style: none; }
.causes > li { padding: .45rem 0; border-top: 1px solid var(--line); }
.causes code { overflow-wrap: anywhere; }
.causes button { margin: .15rem .15rem 0 0; font-size: .8rem; }
#rows thead th:not(:first-child) { writing-mode: vertical-rl; rotate: 180deg; text-align: left; max-height: 11rem;
  font-size: .85rem; border-bottom: 0; border-top: 1px solid var(--line); }
#rows td { width: 2.6rem; padding: .35rem .3rem; }
#rows tbody th:first-child { min-width: 20rem; }
tr.area td { font-size: .75rem; }
.id { font: 700 .85rem ui-monospace, monospace; white-space: nowrap; margin-right: .5rem; }
.source { display: block; font-size: .8rem; color: var(--soft); }
[hidden] { display: none !important; }
dialog { width: min(56rem, calc(100vw - 1rem)); max-height: calc(100vh - 2rem); border: 1px solid var(--line);
  border-radius: .5rem; padding: 1rem; background: var(--page); color: var(--text); }
dialog::backdrop { background: rgb(0 0 0 / .5); }
dialog h2 { font-size: 1.1rem; margin: 0 2.5rem .5rem 0; }
dialog h3 { font-size: .95rem; margin: .75rem 0 .25rem; }
pre { margin: 0; padding: .6rem; overflow: auto; max-height: 22rem; background: var(--band); border-radius: .3rem;
  font: .82rem/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
dialog button { min-height: 2.2rem; padding: .2rem .8rem; border: 1px solid var(--line); border-radius: .3rem;
  background: var(--band); color: var(--text); font: inherit; cursor: pointer; margin: .5rem .5rem 0 0; }
@media (max-width: 40rem) {
  body { padding: .5rem; }
  th, td { padding: .3rem .35rem; }
  #rows tbody th:first-child { min-width: 11rem; width: 11rem; max-width: 11rem; font-size: .85rem; }
  #areas { font-size: .85rem; }
  #areas thead small { display: none; }
  #areas td { min-width: 4.3rem; }
  .source { display: none; }
}
@media print { .frame { max-height: none; overflow: visible; } fieldset { display: none; } }
"""

SCRIPT = """
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
all('button[data-opens]').forEach(button => button.addEventListener('click',
  () => document.getElementById(button.dataset.opens).showModal()));
all('dialog').forEach(dialog => dialog.addEventListener('click',
  event => { if (event.target === dialog) dialog.close(); }));
all('button[data-copies]').forEach(button => button.addEventListener('click', async () => {
  const source = document.getElementById(button.dataset.copies);
  const status = button.nextElementSibling;
  try {
    await navigator.clipboard.writeText(source.textContent);
    status.textContent = 'Copied.';
  } catch {
    getSelection().selectAllChildren(source);
    status.textContent = document.execCommand('copy') ? 'Copied.' : 'Selected: copy it with the keyboard.';
  }
}));
const count = document.getElementById('count');
const filter = wanted => {
  let shown = 0;
  all('tr[data-outcomes]').forEach(row => {
    row.hidden = wanted !== 'all' && !row.dataset.outcomes.split(' ').includes(wanted);
    shown += !row.hidden;
  });
  all('#rows tbody').forEach(body => { body.hidden = all('tr[data-outcomes]', body).every(row => row.hidden); });
  count.textContent = shown + ' of ' + all('tr[data-outcomes]').length + ' requirements';
};
all('input[name=outcome]').forEach(input => input.addEventListener('change', () => filter(input.value)));
filter(document.querySelector('input[name=outcome]:checked').value);
"""

// The code beside the text: it follows the reader, and shows what is clicked.
// Without this file every link still leads somewhere: one to code, to the page of its module.

const frame = document.querySelector("iframe[name=code]");
const links = [...document.querySelectorAll("main a.to-code, .quote a.number")];
const followed = links.filter((link) => link.matches(".to-code"));
let last = null; // what the reader has come to

// a module in the pane of a page needs no head of its own
if (window.top !== window) document.documentElement.classList.add("inside");

function show(link) {
  for (const other of links) other.classList.toggle("shown", other === link);
  frame.contentWindow.location.replace(link.href); // `replace`: Back leads to the page before, not to the lines before
}

function follow() {
  const above = followed.filter((link) => {
    const { top, height } = link.getBoundingClientRect(); // no height: folded
    return height && top < innerHeight / 2;
  });
  const current = above.at(-1) ?? followed[0];
  if (current !== last) show((last = current));
}

function open(yes) {
  document.body.classList.toggle("open", yes);
}

if (frame) {
  const wide = matchMedia("(min-width: 70rem)"); // as in theme.css
  let waiting = false;
  addEventListener("scroll", () => {
    if (waiting || !wide.matches) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      follow();
    });
  });
  for (const link of links) {
    link.addEventListener("click", (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return; // the reader wants a tab
      event.preventDefault();
      show(link);
      open(true);
      if (!wide.matches) link.scrollIntoView(); // above the pane, which is over the lower part
    });
  }
  document.querySelector(".pane button").addEventListener("click", () => open(false));
  addEventListener("keydown", (event) => event.key === "Escape" && open(false));
  addEventListener("hashchange", () => open(false)); // a mark beside the code was followed
}

addEventListener("hashchange", () => document.querySelector(".menu")?.removeAttribute("open"));

// Opens a page from disk in Chromium, without network, as a reader would: on a desktop and on a
// phone, light and dark. Prints what it saw as one JSON document, and leaves a screenshot of each.
//
// node look.js CHROMIUM PAGE FOLDER
const path = require('node:path');
const { pathToFileURL } = require('node:url');
const puppeteer = require('puppeteer-core');

const VIEWS = [
  { name: 'desktop', width: 1280, height: 900, isMobile: false },
  { name: 'phone', width: 390, height: 844, isMobile: true, deviceScaleFactor: 2 },
];

async function look(browser, page, folder, view, scheme) {
  const tab = await browser.newPage();
  const seen = { view: view.name, scheme, requests: [], errors: [] };
  tab.on('request', (request) => {
    const url = request.url();
    if (url !== page && !url.startsWith('data:')) seen.requests.push(url);
  });
  tab.on('requestfailed', (request) => seen.errors.push(`failed: ${request.url()}`));
  tab.on('pageerror', (error) => seen.errors.push(String(error)));
  tab.on('console', (message) => seen.errors.push(message.text()));
  await tab.setOfflineMode(true);
  await tab.setViewport(view);
  await tab.emulateMediaFeatures([{ name: 'prefers-color-scheme', value: scheme }]);
  await tab.goto(page, { waitUntil: 'load' });
  Object.assign(seen, await tab.evaluate(() => {
    const luminance = (color) => {
      const [r, g, b] = color.match(/[\d.]+/g).slice(0, 3).map((part) => {
        const share = part / 255;
        return share <= 0.03928 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
      });
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const background = (element) => {
      for (let e = element; e; e = e.parentElement) {
        const color = getComputedStyle(e).backgroundColor;
        if (!/, 0\)$/.test(color)) return color;
      }
      return 'rgb(255, 255, 255)';
    };
    // Text that is too pale to read: the contrast that WCAG asks of ordinary text is 4.5.
    const pale = new Set();
    for (const element of document.querySelectorAll('h1,h2,h3,h4,p,td,th,span,li,dt,dd,summary,footer,b,pre')) {
      if (!element.innerText?.trim()) continue;
      const [one, other] = [getComputedStyle(element).color, background(element)].map(luminance);
      const contrast = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
      if (contrast < 4.5) pale.add(`${contrast.toFixed(2)}: ${element.innerText.slice(0, 40)}`);
    }
    return {
      title: document.title,
      headings: [...document.querySelectorAll('h2')].map((heading) => heading.innerText),
      figures: [...document.querySelectorAll('.figure')].map((figure) => figure.innerText),
      plots: document.querySelectorAll('svg').length,
      scripts: document.scripts.length,
      images: document.images.length,
      // Wide tables scroll in themselves; the page does not.
      overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
      background: getComputedStyle(document.body).backgroundColor,
      pale: [...pale],
    };
  }));
  await tab.screenshot({ path: path.join(folder, `report-${view.name}-${scheme}.png`), fullPage: true });
  await tab.close();
  return seen;
}

(async () => {
  const [chromium, file, folder] = process.argv.slice(2);
  const browser = await puppeteer.launch({
    executablePath: chromium,
    // Chromium's own sandbox is not to be had as root, nor in a container; the page is ours.
    args: ['--no-sandbox', '--disable-dev-shm-usage'],
  });
  try {
    const page = pathToFileURL(file).href;
    const seen = [];
    for (const view of VIEWS) {
      for (const scheme of ['light', 'dark']) seen.push(await look(browser, page, folder, view, scheme));
    }
    console.log(JSON.stringify(seen));
  } finally {
    await browser.close();
  }
})();

// What the operating system says of this machine, of this process, and of what disturbs it; null where it does not.
// The figures are those of system.py.

import { readFileSync, readdirSync } from "node:fs";
import os from "node:os";
import process from "node:process";

export function hostFacts(versions) {
  const [cpu] = os.cpus();
  return {
    cpu: cpu?.model?.trim() || null,
    cores: os.availableParallelism(),
    machine: os.machine(),
    system: `${os.type()} ${os.release()}`,
    memory_bytes: os.totalmem(),
    gpu: null,
    versions,
  };
}

export function memoryNow() {
  const status = table("/proc/self/status");
  const file = status.RssFile === undefined ? null : status.RssFile + (status.RssShmem ?? 0);
  return {
    resident_bytes: process.memoryUsage.rss(),
    peak_resident_bytes: status.VmHWM ?? process.resourceUsage().maxRSS * 1024,
    proportional_bytes: table("/proc/self/smaps_rollup").Pss ?? null,
    anonymous_bytes: status.RssAnon ?? null,
    file_bytes: file,
  };
}

// Counts from now until read(); see NoiseMeter in system.py.
export function noiseMeter() {
  const before = noiseNow();
  return {
    read() {
      const after = noiseNow();
      const passed = before.ticks && after.ticks && subtract(after.ticks, before.ticks);
      const seconds = after.seconds - before.seconds;
      const own = (after.ownSeconds - before.ownSeconds) * 100; // Linux counts in hundredths of a second
      return {
        seconds,
        involuntary_switches: after.switches - before.switches,
        steal_ratio: passed && passed.all > 0 ? passed.steal / passed.all : null,
        waiting_ratio: before.stall === null || after.stall === null ? null : (after.stall - before.stall) / seconds,
        others_ratio: passed && passed.all > 0 ? Math.max(0, passed.busy - own) / passed.all : null,
        load_average: process.platform === "win32" ? null : os.loadavg()[0],
      };
    },
  };
}

function noiseNow() {
  const { user, system } = process.cpuUsage();
  return {
    seconds: Number(process.hrtime.bigint()) / 1e9,
    ownSeconds: (user + system) / 1e6,
    switches: process.resourceUsage().involuntaryContextSwitches,
    ticks: cpuTicks(),
    stall: stallSeconds(),
  };
}

// Energy, clock and temperature from now until read(); see SystemMeter in system.py.
export function systemMeter() {
  const before = systemNow();
  return {
    read() {
      const after = systemNow();
      const used = before.energy === null || after.energy === null ? null : after.energy - before.energy;
      const clocks = [...before.clocks, ...after.clocks];
      return {
        energy_j: used === null || used < 0 ? null : used, // below 0: the counter began anew
        clock_hz_min: clocks.length > 0 ? Math.min(...clocks) : null,
        clock_hz_max: clocks.length > 0 ? Math.max(...clocks) : null,
        temperature_c_start: before.temperature,
        temperature_c_end: after.temperature,
      };
    },
  };
}

function systemNow() {
  const energies = numbers("/sys/class/powercap", /^intel-rapl:[0-9]$/, "energy_uj");
  const temperatures = numbers("/sys/class/thermal", /^thermal_zone[0-9]+$/, "temp");
  return {
    energy: energies.length > 0 ? energies.reduce((sum, value) => sum + value, 0) / 1e6 : null,
    clocks: numbers("/sys/devices/system/cpu", /^cpu[0-9]+$/, "cpufreq/scaling_cur_freq").map((value) => value * 1e3),
    temperature: temperatures.length > 0 ? Math.max(...temperatures) / 1e3 : null,
  };
}

function numbers(folder, pattern, file) {
  let names;
  try {
    names = readdirSync(folder).filter((name) => pattern.test(name));
  } catch {
    return [];
  }
  return names.map((name) => Number(text(`${folder}/${name}/${file}`) ?? Number.NaN)).filter(Number.isFinite);
}

// man 5 proc_stat, line "cpu": user nice system idle iowait irq softirq steal
function cpuTicks() {
  const words = text("/proc/stat")?.split("\n", 1)[0].trim().split(/\s+/) ?? [];
  if (words.length < 9 || words[0] !== "cpu") return null;
  const ticks = words.slice(1, 9).map(Number);
  const all = ticks.reduce((sum, value) => sum + value, 0);
  return { all, steal: ticks[7], busy: all - ticks[3] - ticks[4] - ticks[7] };
}

function subtract(after, before) {
  return Object.fromEntries(Object.keys(after).map((name) => [name, after[name] - before[name]]));
}

// PSI: for how long some task has waited for a core since boot
function stallSeconds() {
  const found = /^some .*total=(\d+)/.exec(text("/proc/pressure/cpu") ?? "");
  return found === null ? null : Number(found[1]) / 1e6;
}

// The "Name:  123 kB" lines of a file in /proc in bytes
function table(path) {
  const lines = (text(path) ?? "").matchAll(/^(\w+):\s+(\d+) kB$/gm);
  return Object.fromEntries([...lines].map(([, name, value]) => [name, Number(value) * 1024]));
}

function text(path) {
  try {
    return readFileSync(path, "utf-8");
  } catch {
    return null;
  }
}

"""A second scorer, written from the definition of the metrics and nothing else: plain loops over videos, classes, seconds
and runs, no NumPy, no sharing, no shortcuts. It is slow on purpose. Rows are lists of T numbers, a video is a list of C rows."""


def find_runs(row):
    "Maximal stretches of ones as (first, one past last)"
    runs, inside = [], False
    for t in range(len(row)):
        if row[t] and not inside:
            runs.append([t, t + 1])
        elif row[t]:
            runs[-1][1] = t + 1
        inside = bool(row[t])
    return runs


def iou(p, g):
    p, g = set(range(*p)), set(range(*g))
    return len(p & g) / len(p | g)


def segment_counts(pred, true):
    "TP, FP, FN of one class, in seconds"
    tp = fp = fn = 0
    for s, g in zip(pred, true):
        if s and g:
            tp += 1
        elif s:
            fp += 1
        elif g:
            fn += 1
    return tp, fp, fn


def event_counts(pred, true):
    "TP, FP, FN of one class, in runs; the first match ends the search and matched runs are not used up"
    tp = fp = fn = 0
    pred, true = find_runs(pred), find_runs(true)
    for p in pred:
        for g in true:
            if iou(p, g) >= 0.5:
                tp += 1
                break
        else:
            fp += 1
    for g in true:
        for p in pred:
            if iou(p, g) >= 0.5:
                break
        else:
            fn += 1
    return tp, fp, fn


def macro(per_class):
    "Mean F over the classes that occur in prediction or truth; 1.0 if there is none"
    scores = []
    for tp, fp, fn in per_class:
        if tp + fp + fn > 0:
            scores.append(2 * tp / (2 * tp + fp + fn))
    return sum(scores) / len(scores) if scores else 1.0


def both(a, v): return [[x * y for x, y in zip(r, q)] for r, q in zip(a, v)]
def first_only(a, v): return [[x * (1 - y) for x, y in zip(r, q)] for r, q in zip(a, v)]


def score_video(pred_a, pred_v, true_a, true_v):
    "All nine scores of one video at both levels; inputs are C lists of T zeros and ones"
    pairs = {"A": (pred_a, true_a), "V": (pred_v, true_v), "AV": (both(pred_a, pred_v), both(true_a, true_v)),
             "Ao": (first_only(pred_a, pred_v), first_only(true_a, true_v)),
             "Vo": (first_only(pred_v, pred_a), first_only(true_v, true_a))}
    out = {}
    for level, counts in (("segment", segment_counts), ("event", event_counts)):
        table = {k: [counts(s, g) for s, g in zip(*pair)] for k, pair in pairs.items()}
        f = {k: macro(rows) for k, rows in table.items()}
        for name, (x, y) in {"Event@AV": ("A", "V"), "Event@AVo": ("Ao", "Vo")}.items():
            f[name] = macro([[i + j for i, j in zip(p, q)] for p, q in zip(table[x], table[y])])
        f["Type@AV"] = (f["A"] + f["V"] + f["AV"]) / 3
        f["Type@AVo"] = (f["Ao"] + f["Vo"] + f["AV"]) / 3
        out[level] = f
    return out


def score(pred_audio, pred_visual, true_audio, true_visual):
    "Score (N,T,C) arrays video by video: a list of dictionaries"
    videos = zip(*[x.transpose(0, 2, 1).astype(int).tolist() for x in (pred_audio, pred_visual, true_audio, true_visual)])
    return [score_video(*v) for v in videos]

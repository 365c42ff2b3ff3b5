#include "pi2_cpu.h"

extern "C" int64_t pi2_cpu_find_slots(const pi2_slots* t, int64_t ffn, const int32_t* neurons, int64_t k,
                                      int32_t* slots) {
  const int32_t* const slot_of = t->slot_of + ffn * t->neurons;
  int64_t missing = 0;
  for (int64_t i = 0; i < k; ++i) {
    slots[i] = slot_of[neurons[i]];
    missing += slots[i] < 0;
  }
  return missing;
}

extern "C" int64_t pi2_cpu_seat_slots(const pi2_slots* t, int64_t ffn, const int32_t* neurons, int64_t k,
                                      int32_t* slots) {
  const int64_t first = ffn * t->neurons, before = *t->n_free;
  int64_t left = before;
  for (int64_t i = 0; i < k && left > 0; ++i) {
    if (slots[i] >= 0) continue;
    const int32_t slot = slots[i] = t->free[--left];
    t->slot_of[first + neurons[i]] = slot;
    t->key_of[slot] = first + neurons[i];
    t->states[slot] = 0;  // EMPTY
    t->touched[slot] = 1;
  }
  *t->n_free = left;
  return before - left;
}

// What stands for kernels_cu/code_products.cuh on the host. A product reads its second operand when its
// own thread waits for it; its first must be the same then as when it was started.
#pragma once

inline void st_shared_16(void* p, const uint4& v, CALLER) {
    if (!shim::in_shared(p, 16)) shim::fail("line %d: a store not to shared memory", line);
    if (!is_aligned_16(p)) shim::fail("line %d: a 16-byte store not aligned to 16", line);
    *static_cast<uint4*>(p) = v;
    shim::stored(shim::self->lane) = true;
}

inline void hold_vector(uint4&) {}

namespace shim {

struct QuadRegisters {
    const uint32_t* own;
    uint32_t (*quad)[4];
};

inline void gather_quads(void** lanes, uint32_t) {
    for (int lane = 0; lane < 32; ++lane) {
        for (int t = 0; t < 4; ++t) {
            const auto* from = static_cast<QuadRegisters*>(lanes[lane / 4 * 4 + t]);
            memcpy(static_cast<QuadRegisters*>(lanes[lane])->quad[t], from->own, 16);
        }
    }
}

template <int N>
void multiply_registers(const Product& product) {
    if (memcmp(product.registers, product.quad[self->lane % 4], 16)) {
        fail("registers of a product at work have changed");
    }
    float rows[2][16];
    for (int k = 0; k < 16; ++k) {
        for (int h = 0; h < 2; ++h) {
            const uint32_t pair = product.quad[k % 8 / 2][k / 8 * 2 + h];
            rows[h][k] = half_of(pair, k % 2, (__nv_bfloat16*)nullptr);
        }
    }
    multiply_rows<__nv_bfloat16, N>(product, rows);
}

}  // namespace shim

template <int N>
struct CodeWgmma {
    static void registers(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b, int add, CALLER) {
        shim::Product product = {
            shim::multiply_registers<N>, &d[0][0], 0, b, add, shim::own_products().group, a, {}};
        shim::QuadRegisters payload = {a, product.quad};
        shim::collective("wgmma", shim::gather_quads, &payload, FULL_WARP, line);
        shim::new_product(add) = product;
    }
};

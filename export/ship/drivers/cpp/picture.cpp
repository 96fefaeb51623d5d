#include "picture.hpp"

#include <png.h>

#include <array>
#include <cstring>
#include <fstream>
#include <iterator>

#include "error.hpp"

namespace stillgraph {
namespace {

const std::string STAGE = "read image";

struct Source {
    const Bytes& bytes;
    std::size_t at = 0;
};

void feed(png_structp png, png_bytep into, png_size_t count) {
    auto& source = *static_cast<Source*>(png_get_io_ptr(png));
    if (count > source.bytes.size() - source.at) png_error(png, "it ends early");
    std::memcpy(into, source.bytes.data() + source.at, count);
    source.at += count;
}

[[noreturn]] void fail(png_structp, png_const_charp message) { throw Error(STAGE, message, "give a PNG file"); }
void ignore(png_structp, png_const_charp) {}

class Png {
public:
    explicit Png(const Bytes& bytes) : source_{bytes} {
        png_ = png_create_read_struct(PNG_LIBPNG_VER_STRING, nullptr, fail, ignore);
        info_ = png_create_info_struct(png_);
        png_set_read_fn(png_, &source_, feed);
    }
    Png(const Png&) = delete;
    ~Png() { png_destroy_read_struct(&png_, &info_, nullptr); }

    // [H, W, 4]. No gamma is applied, as Pillow applies none.
    Bytes rgba(const std::string& name, std::int64_t height, std::int64_t width, bool convert) {
        png_read_info(png_, info_);
        check(name, height, width, convert);
        png_set_expand(png_);
        png_set_gray_to_rgb(png_);
        png_set_add_alpha(png_, 255, PNG_FILLER_AFTER);
        png_set_interlace_handling(png_);
        png_read_update_info(png_, info_);
        Bytes pixels(static_cast<std::size_t>(height * width * 4));
        std::vector<png_bytep> rows;
        for (std::int64_t row = 0; row < height; ++row) rows.push_back(pixels.data() + row * width * 4);
        png_read_image(png_, rows.data());
        return pixels;
    }

private:
    void check(const std::string& name, std::int64_t height, std::int64_t width, bool convert) {
        const std::int64_t high = png_get_image_height(png_, info_), wide = png_get_image_width(png_, info_);
        if (high != height || wide != width) {
            const std::string is = std::to_string(wide) + " x " + std::to_string(high) + " pixels";
            const std::string wants = std::to_string(width) + " x " + std::to_string(height);
            throw Error(STAGE, name + " has " + is + " and the model takes " + wants, "resize it first");
        }
        if (png_get_bit_depth(png_, info_) > 8) {
            throw Error(STAGE, name + " has 16 bits a channel", "give 8 bits a channel");
        }
        const bool rgb = png_get_color_type(png_, info_) == PNG_COLOR_TYPE_RGB;
        if (!convert && (!rgb || png_get_valid(png_, info_, PNG_INFO_tRNS))) {
            throw Error(STAGE, name + " is not RGB and the model's processor does not convert", "give an RGB image");
        }
    }

    Source source_;
    png_structp png_;
    png_infop info_;
};

// What each of the 256 values of a channel becomes. The product is of doubles and rounded to float, as
// transformers has it; the rest is of floats.
std::array<float, 256> value_table(const Pixels& steps, std::size_t channel) {
    std::array<float, 256> table{};
    for (std::size_t value = 0; value < table.size(); ++value) {
        const auto number = static_cast<double>(value);
        table[value] = static_cast<float>(steps.scale ? number * *steps.scale : number);
        if (steps.mean && steps.std) {
            table[value] = (table[value] - (*steps.mean)[channel]) / (*steps.std)[channel];
        }
    }
    return table;
}

// A channel over white, in Pillow's arithmetic of 7 more bits (AlphaComposite.c).
std::size_t over_white(std::uint32_t value, std::uint32_t alpha) {
    const std::uint32_t sum = value * alpha * 128 + 255 * (255 - alpha) * 128 + (0x80 << 7);
    return (((sum >> 8) + sum) >> 8) >> 7;
}

}  // namespace

Bytes read_bytes(const std::filesystem::path& path, const std::string& stage) {
    std::ifstream stream(path, std::ios::binary);
    if (!stream || std::filesystem::is_directory(path)) {
        throw Error(stage, path.string() + " is not a file that can be read", "give the path of one");
    }
    return {std::istreambuf_iterator<char>(stream), {}};
}

std::vector<float> pixel_values(const Bytes& png, const std::string& name, const Manifest& manifest) {
    if (!manifest.vision || !manifest.calling.images) {
        const std::string problem = manifest.bundle.string() + " does not say how its model is given images";
        throw Error(STAGE, problem, "leave them out, or use a model that sees");
    }
    const std::int64_t area = manifest.vision->height * manifest.vision->width;
    const Pixels& steps = *manifest.calling.images;
    const Bytes rgba = Png(png).rgba(name, manifest.vision->height, manifest.vision->width, steps.convert_rgb);
    std::vector<float> values;
    values.reserve(static_cast<std::size_t>(3 * area));
    for (std::size_t channel = 0; channel < 3; ++channel) {
        const std::array<float, 256> table = value_table(steps, channel);
        for (std::int64_t pixel = 0; pixel < area; ++pixel) {
            values.push_back(table[over_white(rgba[pixel * 4 + channel], rgba[pixel * 4 + 3])]);
        }
    }
    return values;
}

}  // namespace stillgraph
